"""The documentation says what the program does: every command, option, key and metric, and lines that run."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest
import typer

from buffers.policy import Buffer
from buffers.replay_buffer import POLICIES
from daemon import cli
from daemon.cli.app import app
from daemon.config import Config, Model, explained, load
from daemon.web.reference import reference as metrics_reference
from strategies.catalog import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OPERATE = (DOCS / "operate.md").read_text("utf-8")
STRATEGIES = (DOCS / "strategies.md").read_text("utf-8")
CONFIGURE = (DOCS / "configure.md").read_text("utf-8")
SAFE = ("init", "check-config", "completion", "status", "history", "versions")
"""Commands that the README's lines may really run, in an empty directory."""


def commands(group: typer.core.TyperGroup, prefix: str = "") -> dict[str, set[str]]:
    """`{"quarantine ls": {"--limit", ...}, ...}`."""
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix}{name} ")
        else:
            found[prefix + name] = {each for option in command.params for each in option.opts if each.startswith("-")}
    return found


COMMANDS = commands(typer.main.get_command(app))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    """A heading in docs/operate.md that begins with it."""
    headings = [line for line in OPERATE.splitlines() if line.startswith("### ")]
    assert any(f"`eternad {command}" in line for line in headings), f"docs/operate.md has no heading for {command}"


def test_every_option_is_documented_with_its_command() -> None:
    """In the heading; --config, --json, --help and the number of rows are explained once."""
    common = {"--config", "-c", "--json", "-h", "--help", "--limit", "-n"}
    headings = [line for line in OPERATE.splitlines() if line.startswith("### ")]
    for command, options in COMMANDS.items():
        heading = next(line for line in headings if f"`eternad {command}" in line)
        short = {"-f": "--follow", "-o": "--output", "-w": "--watch"}
        missing = {each for each in options - common if each not in heading}
        missing -= {long for brief, long in short.items() if brief in heading}
        missing -= {brief for brief, long in short.items() if long in heading}
        assert not missing, f"{command}: {missing} missing in its heading"


def test_every_documented_command_exists() -> None:
    """No heading outlives its command."""
    for command in re.findall(r"`eternad ([a-z][a-z -]*[a-z])", OPERATE):
        known = any(command.split()[: len(name.split())] == name.split() for name in COMMANDS)
        assert known or command in ("quarantine", "buffer"), command


def test_the_configurations_tables_are_made_of_the_program() -> None:
    """When this fails: `python -m daemon.config.explained docs/configure.md`."""
    assert CONFIGURE.partition("docs/configure.md` -->\n")[2] == explained.reference()


def test_the_metrics_tables_are_made_of_the_program() -> None:
    """When this fails: `python -m daemon.web.reference docs/operate.md`."""
    assert OPERATE.partition("docs/operate.md` -->\n")[2] == metrics_reference()


def test_only_what_is_behind_a_pages_marker_is_made_anew(tmp_path: Path) -> None:
    """What was written by hand stays."""
    page = tmp_path / "page.md"
    page.write_text("by hand\n<!-- x: made by `y` -->\nold\n")
    explained.rewrite(page, "new\n")
    assert page.read_text() == "by hand\n<!-- x: made by `y` -->\nnew\n"
    page.write_text("no marker\n")
    with pytest.raises(ValueError, match="has no marker"):
        explained.rewrite(page, "new\n")


def test_every_key_of_the_program_is_explained() -> None:
    """Every table of the configuration has a section, every key a row with its kind, its default and words."""
    for name, table in (*explained.TABLES, *((f'name = "{key}"', each) for key, each in BY_NAME.items())):
        assert name in CONFIGURE
        for key, field in zip(explained.keys_of(table), msgspec.structs.fields(table), strict=True):
            assert key.name == field.encode_name
            assert key.kind != "table" or key.is_table, f"{table.__name__}.{key.name}: what is {key.kind}?"
            assert f"| `{key.name}` | {key.kind.replace('|', chr(92) + '|')} |" in CONFIGURE


@pytest.mark.parametrize("name", BY_NAME)
def test_every_strategy_is_told_with_its_parameters_and_defaults(name: str) -> None:
    """What it does, its source, when to use it, what it costs or what was measured; no parameter more or less."""
    section = STRATEGIES.partition(f"\n### `{name}`\n")[2].partition("\n### ")[0].partition("\n## ")[0]
    parameters = re.search(r"^- Parameters: (.*)\.$", section, re.MULTILINE)
    assert parameters is not None
    assert parameters[1] == ", ".join(f"`{key.name} = {key.default}`" for key in explained.keys_of(BY_NAME[name]))
    assert "arXiv:" in section
    assert "- Use it: " in section
    assert "- Measured" in section


def test_every_policy_of_the_buffer_is_told() -> None:
    """A row of the table each, and every key of its table in the text."""
    for policy in POLICIES:
        assert f"\n| `{policy}` |" in STRATEGIES
    for key in explained.keys_of(Buffer):
        assert f"`{key.name}`" in STRATEGIES, key.name


def test_no_table_of_the_configuration_is_left_out() -> None:
    """A new struct in `Config` or `Model` needs a line in `explained.TABLES`."""
    known = {table for _, table in explained.TABLES}
    for table in (Config, Model):
        for field in msgspec.structs.fields(table):
            if isinstance(field.default, msgspec.Struct):
                assert type(field.default) in known, field.name


def test_the_smallest_configuration_of_the_docs_works(tmp_path: Path) -> None:
    """The first example that anybody copies."""
    found = re.search(r"```toml\n(.*?)```", CONFIGURE, re.DOTALL)
    assert found is not None
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "eternad.toml").write_text(found[1])
    assert list(load(tmp_path / "eternad.toml").models) == ["npc"]


def test_what_init_writes_says_the_defaults(tmp_path: Path) -> None:
    """Every commented key, switched on, gives the configuration that leaving it out gives."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    text = explained.commented("npc", Path("base"))
    (tmp_path / "plain.toml").write_text(text)
    head, strategies = text.split("# Rehearsal", 1)
    switched_on = re.sub(r"^# (\w+ = (?!\.\.\.).+)$", r"\1", head, flags=re.MULTILINE) + "# Rehearsal" + strategies
    tomllib.loads(switched_on)
    (tmp_path / "all.toml").write_text(switched_on)
    assert switched_on != text
    assert load(tmp_path / "all.toml") == load(tmp_path / "plain.toml")


def shell_lines(path: Path) -> list[str]:
    """The lines of the ```sh and ```console blocks of a page that call eternad."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(\S*/)?eternad ", line)]


PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_in_shell_blocks_exist_with_their_options(page: Path) -> None:
    """Somebody will copy them."""
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)[1:]
        words = words[: next((at for at, word in enumerate(words) if word in ("|", ">", "&", "&&")), len(words))]
        while words and words[0] in ("--config", "-c"):
            words = words[2:]
        name = next((each for each in (" ".join(words[:2]), words[0]) if each in COMMANDS), None)
        assert name is not None, f"{page.name}: no such command: {line}"
        unknown = {word.split("=")[0] for word in words if word.startswith("-")} - COMMANDS[name] - {"--help", "-h"}
        assert not unknown, f"{page.name}: {line}: no option {unknown}"


def test_the_readmes_harmless_commands_run(tmp_path: Path) -> None:
    """From an empty directory, in their order."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    run = [sys.executable, "-c", "import sys; from daemon.cli import main; sys.exit(main())"]
    done = subprocess.run([*run, "init", "eternad.toml"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
    for line in shell_lines(ROOT / "README.md"):
        words = shlex.split(line, comments=True)[1:]
        if words[0] in SAFE and not {"|", ">", "&", "-c", "--config", "--watch", "-w"} & set(words):
            extra = ["--force"] if words[0] == "init" else []
            answer = subprocess.run([*run, *words, *extra], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=False)
            assert answer.returncode == 0, line


def test_every_first_sentence_of_a_command_fits_its_list() -> None:
    """`eternad --help` on 80 columns cuts nothing off."""
    done = subprocess.run(
        [sys.executable, "-m", "daemon", "--help"], capture_output=True, text=True, check=True, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
    )  # fmt: skip
    assert "..." not in done.stdout.split("Commands:")[1]
    assert cli.__doc__
