"""The command line: what it says, its exit codes, what it needs no daemon for, and that it starts at once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from operator_kit import answering, config_fixture, eternad_fixture, make_config, state_fixture

from buffers import claims
from buffers.policy import Buffer
from daemon import cli
from daemon.cli import context, glance, screen
from daemon.cli.failure import BAD_CONFIG, FAILED, USAGE
from daemon.config import load
from daemon.state import runs
from daemon.state.database import open_database, transaction
from strategies.request import write

Eternad = Any
fixtures = (config_fixture, state_fixture, eternad_fixture)


def test_the_command_never_imports_torch_and_status_not_even_typer(config: Path) -> None:
    """`status` is called by people and scripts all day: it imports what it needs and nothing else."""
    code = (
        "import sys; from daemon.cli import main; assert main(['status', '--json']) == 0;"
        "bad = {'torch', 'transformers', 'avalanche', 'peft', 'typer', 'rich', 'starlette'} & set(sys.modules);"
        "assert not bad, bad; assert main(['history']) == 0;"
        "bad = {'torch', 'transformers', 'avalanche', 'peft', 'starlette', 'uvicorn'} & set(sys.modules);"
        "assert not bad, bad"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=config.parent, env=environment, check=True, capture_output=True)


def test_before_the_first_start_everything_says_so(eternad: Eternad) -> None:
    """No state yet is no error."""
    assert "eternad is not running" in eternad("status")
    assert eternad("history") == "no run yet\n"
    assert "base models are served" in eternad("versions")
    assert eternad("quarantine", "ls") == "nothing is quarantined\n"
    assert eternad("log") == ""
    assert "nothing was learned yet" in eternad("buffer", "show", "npc")


def test_status_shows_the_pipeline_while_the_daemon_is_down(eternad: Eternad, state: Path) -> None:
    """Version, what waits and for what, the run with its progress, the last verdict, the quarantine."""
    text = eternad("status")
    assert "npc  version 2" in text
    assert "3 of 32 examples; at the latest in" in text
    assert "npc-00004 TRAINING [" not in text
    assert re.search(r"npc-00004 TRAINING #########-{11} 45% step 45/100 loss 1\.250 312 tokens/s 12 s left", text)
    assert "npc-00003 REJECTED" in text
    assert "quarantine: 1 not_utf8" in text
    assert "engine local: not asked" in text


def test_status_asks_the_running_daemon(eternad: Eternad, state: Path) -> None:
    """What only the daemon knows comes through its socket."""
    with answering(state):
        text = eternad("status")
        found = json.loads(eternad("status", "--json"))
    assert "eternad is running (pid 4711, up 60 s)" in text
    assert "engine local: ok, serves 2" in text
    assert found["running"] and found["models"][1]["engine_serves"] == 2


def test_status_is_one_document_for_scripts(eternad: Eternad, state: Path) -> None:
    """`--json` has everything, also through the longer way of typer."""
    quick = json.loads(eternad("status", "--json"))
    long = json.loads(eternad("-c", "eternad.toml", "status", "--json"))
    assert [model["name"] for model in quick["models"]] == ["book", "npc"]
    assert quick["models"] == long["models"]
    npc = quick["models"][1]
    assert npc["live_version"] == 2 and npc["run"]["progress"]["step"] == 45 and npc["quarantined"] == 1


def test_a_paused_model_is_shown_with_the_way_back(eternad: Eternad, state: Path) -> None:
    """Nobody should wonder why nothing happens."""
    connection = open_database(state / "eternad.db")
    connection.execute("INSERT INTO setting VALUES ('paused/npc', '1')")
    connection.close()
    assert "paused; 3 examples wait (eternad resume npc)" in eternad("status")


def test_watching_a_pipe_prints_the_status_again_and_again(
    config: Path, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`status --watch` ends with Ctrl-C, exit code 130."""
    turns = iter([None, None])

    def sleep(_seconds: float) -> None:
        if next(turns, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr(glance.time, "sleep", sleep)
    assert cli.main(["status", "--watch"]) == 130
    assert capsys.readouterr().out.count("npc  version 2") == 3


def test_history_lists_runs_newest_first(eternad: Eternad, state: Path) -> None:
    """Of one model or all, as a table or as JSON."""
    lines = eternad("history", "npc").splitlines()
    assert lines[0].split()[:3] == ["RUN", "STATE", "VERSION"]
    assert [line.split()[0] for line in lines[1:]] == ["npc-00004", "npc-00003", "npc-00002", "npc-00001"]
    assert len(json.loads(eternad("history", "--json", "-n", "2"))) == 2
    assert eternad("history", "book") == "no run yet\n"


def test_versions_show_their_parents(eternad: Eternad, state: Path) -> None:
    """The lineage of what was served."""
    lines = eternad("versions", "npc").splitlines()
    assert lines[1].split()[:5] == ["npc", "2", "live", "1", "npc-00002"]
    assert lines[2].split()[:5] == ["npc", "1", "superseded", "base", "npc-00001"]
    assert json.loads(eternad("versions", "--json"))[0]["number"] == 2


def test_show_explains_a_verdict_by_its_numbers(eternad: Eternad, state: Path) -> None:
    """Losses before and after with intervals, each check with its limit, what each strategy did."""
    text = eternad("show", "npc-00003")
    assert "run npc-00003 of npc: REJECTED" in text
    assert "verdict: rejected" in text
    assert "failed  new_gain: loss on the new hold-out 2.500 -> 4.000" in text
    assert re.search(r"new +10 +3\.000 +2\.500 +4\.000 +\+1\.500 \[\+1\.400, \+1\.600\]", text)
    assert re.search(r"update 1 +10", text)
    assert "replay: replayed 4" in text
    assert "10 steps, 2.0 epochs, 5000 tokens, 400 tokens/s, peak memory 1.0 GiB" in text
    assert json.loads(eternad("show", "npc-00003", "--json"))["report"]["steps"] == 10


def test_show_explains_a_failed_trainer(eternad: Eternad, state: Path) -> None:
    """Code and reason of the trainer's own report."""
    from strategies.request import RunReport

    failed = RunReport(run_id="npc-00003", status="failed", code="oom", reason="7 GiB needed, 6 GiB free")
    write(state / "runs" / "npc-00003" / "report.json", failed)
    assert "the trainer failed (oom): 7 GiB needed" in eternad("show", "npc-00003")


def test_show_a_version_tells_where_it_lies_and_what_made_it(eternad: Eternad, state: Path) -> None:
    """The version's files, then the run's numbers."""
    text = eternad("show", "npc@0002")
    assert "version 2 of npc: live" in text and "parent 1, run npc-00002" in text
    assert f"{state}/versions/npc/0002: 1 files, 7 B, base bbbbbbbbbbbb" in text
    assert "verdict: accepted" in text
    assert json.loads(eternad("show", "npc@2", "--json"))["manifest"]["number"] == 2


def test_show_a_file_tells_what_became_of_it(eternad: Eternad, state: Path) -> None:
    """By its path in the library, from wherever the command is called."""
    text = eternad("show", "content/npc/a.jsonl")
    assert re.search(r"npc +train +consumed +npc-00001 +9", text)
    assert eternad("show", str(state.parent / "library" / "content" / "npc" / "a.jsonl")) == text
    assert "line 3 (not_utf8)" in eternad("show", "content/npc/b.txt")
    assert json.loads(eternad("show", "content/npc/b.txt", "--json"))["quarantine"][0]["line"] == 3


def test_show_of_nothing_says_where_to_look(eternad: Eternad, state: Path) -> None:
    """An unknown name is one sentence."""
    assert "no run, version or known file; see: eternad history" in eternad("show", "npc@9", code=FAILED)


def test_the_audit_log_is_shown_and_verified(eternad: Eternad, state: Path) -> None:
    """Every move of every run; a change in the past is found."""
    text = eternad("log", "-n", "500")
    assert "run.TRAINING" in text and "version.live" in text and "npc@0002" in text
    assert eternad("log", "--verify") == "the audit log is whole\n"
    entries = [json.loads(line) for line in eternad("log", "--json", "-n", "3").splitlines()]
    assert [entry["id"] for entry in entries] == sorted(entry["id"] for entry in entries)
    connection = open_database(state / "eternad.db")
    connection.execute("DROP TRIGGER audit_is_never_changed")  # whoever has the file can
    connection.execute("UPDATE audit SET subject = 'other' WHERE id = 2")
    connection.close()
    assert "changed at row 2" in eternad("log", "--verify", code=FAILED)


def test_the_log_follows_what_happens(
    config: Path, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`log -f` prints each new row once."""
    from daemon.cli import past

    def happen(_seconds: float) -> None:
        connection = open_database(state / "eternad.db")
        with transaction(connection):
            if claims.pending(connection, "npc").train == 0:
                raise KeyboardInterrupt
            run = runs.create(connection, "book", "manual", None, 10)
            assert run is None
            connection.execute("UPDATE example SET state = 'retracted' WHERE state = 'pending'")
            from daemon.state import audit

            audit.write(connection, "tick", "once")
        connection.close()

    monkeypatch.setattr(past.time, "sleep", happen)
    assert cli.main(["log", "-f", "-n", "2"]) == 130
    assert capsys.readouterr().out.count("tick") == 1


def test_quarantine_lists_and_shows_without_obeying_control_characters(eternad: Eternad, state: Path) -> None:
    """What players write cannot colour or move the operator's terminal."""
    listed, shown = eternad("quarantine", "ls"), eternad("quarantine", "show", "1")
    assert "not_utf8" in listed and "\x1b" not in listed + shown
    assert "content/npc/b.txt, line 3" in shown and "\\x1b[31mred" in shown
    assert eternad("quarantine", "ls", "book") == "nothing is quarantined\n"
    assert json.loads(eternad("quarantine", "ls", "--json"))[0]["id"] == 1
    assert json.loads(eternad("quarantine", "show", "1", "--json"))["line"] == 3
    assert "no entry 7" in eternad("quarantine", "show", "7", code=FAILED)


def test_the_buffer_is_shown_by_update_and_exported(eternad: Eternad, state: Path, tmp_path: Path) -> None:
    """What a model rehearses, and each example with its origin."""
    text = eternad("buffer", "show", "npc")
    assert "npc: 18 of at most 2000 examples (reservoir), 18 learned" in text
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()] if eternad(
        "buffer", "export", "npc", "-o", str(tmp_path / "out")
    ) else []  # fmt: skip
    assert len(rows) == 18
    assert rows[0] == {
        "update": 1, "file": "content/npc/a.jsonl", "line": 10,
        "example": {"completion": "a10", "prompt": "q10", "shape": "demonstration"},
    }  # fmt: skip


def test_the_buffer_is_resized_in_the_configuration(eternad: Eternad, state: Path, config: Path) -> None:
    """The file changes, comments stay, and what it then holds is shown; a bound of 0 is none."""
    config.write_text("# mine\n" + config.read_text())
    text = eternad("buffer", "resize", "npc", "--examples", "5", "--tokens", "7000")
    assert "npc: 5 of at most 5 examples" in text and "of at most 7000 tokens" in text
    assert config.read_text().startswith("# mine\n")
    assert load(config).models["npc"].buffer == Buffer(examples=5, tokens=7000)
    assert json.loads(eternad("buffer", "resize", "npc", "--tokens", "0", "--json"))["tokens"] is None
    assert load(config).models["npc"].buffer == Buffer(examples=5)
    assert "give --examples" in eternad("buffer", "resize", "npc", code=USAGE)


def test_a_shortfall_of_the_replay_is_told(eternad: Eternad, state: Path) -> None:
    """What the last update asked for and did not get."""
    connection = open_database(state / "eternad.db")
    with transaction(connection):
        cut = {"replay_wanted": 30, "rows": {"new": 30, "replay": 18}}
        connection.execute("UPDATE run SET cut = ? WHERE model = 'npc'", (json.dumps(cut),))
    connection.close()
    assert "asked for 30 replayed examples and got 18" in eternad("buffer", "show", "npc")
    assert json.loads(eternad("buffer", "show", "npc", "--json"))["replay"]["shortfall"] == 12


def test_a_wrong_model_name_gets_the_nearest(eternad: Eternad) -> None:
    """Exit code 2, as for any usage error."""
    assert "did you mean `npc`?" in eternad("update", "ncp", "--dry-run", code=USAGE)
    assert "there are: npc, book" in eternad("history", "zzzzzz", code=USAGE)


def test_a_bad_configuration_is_exit_code_78(eternad: Eternad, config: Path) -> None:
    """EX_CONFIG, and the daemon's own sentence: what, where, what to do."""
    config.write_text(config.read_text() + "\n[watch]\nstabilty_seconds = 3\n")
    for command in ("status", "history", "check-config"):
        assert "did you mean `stability_seconds`?" in eternad(command, code=BAD_CONFIG)


def test_the_configuration_is_found_by_option_environment_and_place(
    eternad: Eternad, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--config before or after the command, then $ETERNAD_CONFIG, then ./eternad.toml."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    moved = make_config(other)
    assert str(config.parent / "state") in eternad("status")
    assert str(other / "state") in eternad("status", "--config", str(moved))
    assert str(other / "state") in eternad("--config", str(moved), "status")
    monkeypatch.setenv("ETERNAD_CONFIG", str(moved))
    assert str(other / "state") in eternad("status")
    monkeypatch.chdir(other / "base")
    monkeypatch.delenv("ETERNAD_CONFIG")
    assert "Write a first one with: eternad init" in eternad("status", "-c", "nowhere.toml", code=BAD_CONFIG)
    assert context.config_path() == context.PLACES[0]


def test_colours_and_tables_only_where_a_person_looks(
    eternad: Eternad, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal gets colours unless NO_COLOR is set; a pipe gets none."""
    monkeypatch.setattr(screen, "is_terminal", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in eternad("status")
    assert "npc-00004" in eternad("history")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in eternad("status")
    assert "█" in eternad("status")


def test_usage_errors_are_exit_code_2(eternad: Eternad) -> None:
    """An unknown command, a missing argument."""
    assert "No such command" in eternad("frobnicate", code=USAGE)
    assert "Missing argument" in eternad("update", code=USAGE)


def test_a_reader_that_has_seen_enough_is_no_error(config: Path, state: Path) -> None:
    """`eternad log | head -1` ends without a traceback."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m daemon log -n 10000 | head -1"],
        cwd=config.parent, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )  # fmt: skip
    assert done.stderr == ""
