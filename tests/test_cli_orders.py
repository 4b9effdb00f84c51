"""The commands that the daemon carries out, and what they say without it."""

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from operator_kit import answering, config_fixture, eternad_fixture, progress, state_fixture

from daemon.cli.failure import FAILED, NOT_RUNNING, USAGE
from daemon.control import Command
from daemon.state import runs
from daemon.state.database import open_database, transaction

Eternad = Any
fixtures = (config_fixture, state_fixture, eternad_fixture)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("scan",), "scan None"), (("pause",), "pause None"), (("pause", "npc"), "pause npc"),
        (("resume", "npc"), "resume npc"), (("rollback", "npc", "1"), "rollback npc 1"),
        (("rollback", "npc", "base"), "rollback npc 0"), (("reload",), "reload None"),
        (("requeue", "npc-00003"), "requeue None"), (("quarantine", "retry"), "retry None None None"),
        (("quarantine", "drop", "1"), "drop None None 1"), (("update", "npc"), "run npc-00003 started"),
    ],
)  # fmt: skip
def test_orders_reach_the_daemon_and_its_answer_is_printed(
    eternad: Eternad, daemon_state: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Each command that changes something is carried out by the daemon."""
    assert eternad(*arguments).startswith(said)


@pytest.fixture(scope="module")
def module_state(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One answering daemon for all orders."""
    state = tmp_path_factory.mktemp("daemon") / "state"
    with answering(state):
        yield state


@pytest.fixture
def daemon_state(config: Path, module_state: Path) -> Path:
    """The configuration's state directory is that of the answering daemon."""
    config.write_text(config.read_text().replace('"state"', json.dumps(str(module_state))))
    return module_state


def test_a_refusal_is_exit_code_1(eternad: Eternad, daemon_state: Path) -> None:
    """The daemon's reason is the message."""
    assert "no run npc-9; see: eternad history" in eternad("cancel", "npc-9", code=FAILED)


def test_orders_without_a_daemon_are_exit_code_69(eternad: Eternad) -> None:
    """EX_UNAVAILABLE, with the command that starts one."""
    assert "start it with: eternad run" in eternad("scan", code=NOT_RUNNING)


def test_answers_are_json_for_scripts(eternad: Eternad, daemon_state: Path) -> None:
    """The reply as the daemon gave it."""
    assert json.loads(eternad("update", "npc", "--json"))["detail"] == {"run": "npc-00003"}


def test_update_wait_shows_progress_until_the_end(eternad: Eternad, state: Path) -> None:
    """Plain lines in a pipe; a run that is served is exit code 0."""

    def carry_out(command: Command) -> None:
        command.answer("run npc-00004 started", run="npc-00004")
        threading.Timer(0.3, finish).start()

    def finish() -> None:
        connection = open_database(state / "eternad.db")
        with transaction(connection):
            run = runs.get(connection, "npc-00004")
            for to in ("TRAINED", "EVALUATING"):
                run = runs.move(connection, run, to)
            runs.move(connection, run, "REJECTED", "nothing gained")
        connection.close()

    with answering(state, carry_out):
        message = eternad("update", "npc", "--wait", code=FAILED)
    assert "npc-00004 REJECTED: nothing gained; see: eternad show npc-00004" in message


def test_update_wait_prints_one_line_per_phase_and_tenth(
    config: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log of an update is short, whatever the number of steps is."""
    from daemon.cli.update import _lines

    connection = open_database(state / "eternad.db")
    run, show = runs.get(connection, "npc-00004"), _lines()
    connection.close()
    show(run, progress())
    show(run, progress())
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["npc-00004 TRAINING: train step 45/100  loss 1.250  312 tokens/s  12 s left"]


def test_the_progress_bar_is_unknown_then_counts_then_is_full(state: Path) -> None:
    """An update that stops early still ends with a full bar."""
    from daemon.cli.update import _share

    connection = open_database(state / "eternad.db")
    run = runs.get(connection, "npc-00004")
    connection.close()
    at = progress()
    assert _share(run, None) == (None, 0)
    assert _share(run, msgspec.structs.replace(at, phase="baseline")) == (None, 0)
    assert _share(run, at) == (100, 45)
    assert _share(run, msgspec.structs.replace(at, phase="evaluate")) == (100, 100)
    assert _share(msgspec.structs.replace(run, state="PUBLISHED"), at) == (100, 100)


def test_update_dry_run_says_what_would_be_learned(eternad: Eternad, state: Path) -> None:
    """Without a daemon, out of the journal alone."""
    text = eternad("update", "npc", "--dry-run")
    assert "3 new examples and rehearse 3 (of 3 wanted)" in text
    assert "from version 2, with replay" in text
    assert json.loads(eternad("update", "npc", "--dry-run", "--json"))["continues_from"] == 2
    assert "nothing waits for book" in eternad("update", "book", "--dry-run")


def test_rollback_dry_run_says_what_would_be_set_aside(eternad: Eternad, state: Path) -> None:
    """The parent by default; what later versions taught goes with them."""
    assert "served by 1 instead of 2; what versions 2 taught" in eternad("rollback", "npc", "--dry-run")
    assert "served by base instead of 2; what versions 1, 2" in eternad("rollback", "npc", "base", "--dry-run")
    assert "no version 9" in eternad("rollback", "npc", "9", "--dry-run", code=FAILED)
    assert "nothing to roll back" in eternad("rollback", "book", "--dry-run", code=FAILED)
    assert "is no version" in eternad("rollback", "npc", "two", "--dry-run", code=USAGE)
