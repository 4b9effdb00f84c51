"""The operators' pages of the engines: one for each kind, whose configuration loads and whose start line is whole."""

import re
import typing
from pathlib import Path

import msgspec
import pytest

from daemon.config import Engine, load
from daemon.engines.build import build
from serving.__main__ import arguments

DOCS = Path(__file__).resolve().parent.parent / "docs"
OVERVIEW = (DOCS / "engines.md").read_text("utf-8")
KINDS = typing.get_args(msgspec.structs.fields(Engine)[0].type)
SECTIONS = ("## Start", "## Configuration", "## Limits", "## When it is not well")
MODEL = '\n[models.npc]\nbase_path = "base"\nengine = "{name}"\n'


def page(kind: str) -> str:
    return (DOCS / "engines" / f"{kind}.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(r"```toml\n(.*?)```", page(kind), re.DOTALL)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_page_with_all_that_an_operator_needs(kind: str) -> None:
    """And a row of the overview that leads to it."""
    assert f"| [`{kind}`](engines/{kind}.md)" in OVERVIEW
    assert page(kind).startswith(f"# Engine `{kind}`\n")
    assert [section for section in SECTIONS if f"\n{section}" not in page(kind)] == []


def test_no_page_outlives_its_kind() -> None:
    """Nobody may be sent to an engine that is gone."""
    assert {path.stem for path in (DOCS / "engines").iterdir()} == set(KINDS)


@pytest.mark.parametrize(("kind", "at"), [(kind, at) for kind in KINDS for at in range(len(blocks(kind)))])
def test_the_configuration_of_a_page_works(kind: str, at: int, tmp_path: Path) -> None:
    """With a model that it serves; its client can be built."""
    text = blocks(kind)[at]
    name = re.search(r"\[engines\.(\w+)\]", text)
    assert name is not None
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    head = 'library_directory = "library"\nstate_directory = "state"\n'
    (tmp_path / "eternad.toml").write_text(head + text + MODEL.format(name=name[1]))
    config = load(tmp_path / "eternad.toml")
    assert config.engines[name[1]].kind == kind
    build(config.engines[name[1]], tmp_path / "admin.sock" if config.gateway.address else None).close()


def test_every_option_of_the_embedded_engine_is_told_with_its_default() -> None:
    """No more and no less; `--host` and `--port` share a row."""
    options = {option: action.default for action in arguments()._actions for option in action.option_strings}
    told = {}
    for names, values in re.findall(r"^\| (`--[^|]+) \| ([^|]+) \|", page("embedded"), re.MULTILINE):
        told |= dict(zip(names.split(", "), values.split(", "), strict=True))
    expected = {
        f"`{name}`": "required" if name in ("--base", "--adapter-root") else "-" if default is None else f"`{default}`"
        for name, default in options.items() if name not in ("-h", "--help")
    }  # fmt: skip
    assert told == expected
