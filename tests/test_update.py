"""The training child: started once, found again, stopped, and its end understood."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from buffers.policy import Buffer
from daemon import update
from daemon.config import Model
from daemon.update import Trainer, recipe_of
from strategies.catalog import Ewc, Gem, Replay
from strategies.request import Progress, RunReport, write

# a trainer in twelve lines: says what it is told to by the file `orders` of its run
FAKE = """
import os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])
(run / "started").open("a").write(f"{os.getpid()}\\n")
orders = (run / "orders").read_text().split()
def on_term(*_):
    (run / "checkpoint").write_text("")
    os._exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in orders else on_term)
if "report" in orders:
    (run / "report.json").write_text('{"run_id": "r", "status": "trained"}')
    sys.exit(0)
if "crash" in orders:
    sys.exit("Traceback: the GPU fell off the bus")
time.sleep(60)
"""


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Makes a trainer whose child follows the orders given."""
    script = tmp_path / "fake_trainer.py"
    script.write_text(FAKE)
    monkeypatch.setattr(update, "COMMAND", [sys.executable, str(script)])
    run = tmp_path / "run"
    run.mkdir()

    def make(*orders: str) -> Trainer:
        (run / "orders").write_text(" ".join(orders))
        return Trainer(run)

    return make


def wait(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def starts(trainer: Trainer) -> list[str]:
    try:
        return (trainer.run_directory / "started").read_text().split()
    except FileNotFoundError:
        return []


def test_a_report_ends_the_run(trainer: Callable[..., Trainer]) -> None:
    """Exit and report: trained."""
    child = trainer("report")
    child.start()
    wait(child.finished)
    finished = child.finished()
    assert finished is not None
    assert (finished.outcome, finished.report) == ("trained", RunReport(run_id="r", status="trained"))


def test_a_crash_is_told_with_the_last_words(trainer: Callable[..., Trainer]) -> None:
    """Status, and the end of the log, in the reason."""
    child = trainer("crash")
    child.start()
    wait(child.finished)
    finished = child.finished()
    assert finished is not None
    assert finished.outcome == "died"
    assert "status 1" in finished.reason
    assert "fell off the bus" in finished.reason


def test_sigterm_gives_a_checkpoint_and_is_no_failure(trainer: Callable[..., Trainer]) -> None:
    """Exit 75: interrupted, to be resumed."""
    child = trainer()
    child.start()
    wait(lambda: starts(child))
    time.sleep(0.2)  # until the handler is in place
    child.stop(10)
    finished = child.finished()
    assert finished is not None
    assert finished.outcome == "interrupted"


def test_a_deaf_child_is_killed(trainer: Callable[..., Trainer]) -> None:
    """What does not react to SIGTERM in time gets SIGKILL."""
    child = trainer("deaf")
    child.start()
    wait(lambda: starts(child))
    time.sleep(0.2)
    child.stop(0.2)
    finished = child.finished()
    assert finished is not None
    assert "SIGKILL" in finished.reason


def test_a_restarted_daemon_finds_the_child_and_starts_no_second_one(trainer: Callable[..., Trainer]) -> None:
    """The lock lives with the child: another `Trainer` on the same run adopts it, and can stop it."""
    first = trainer()
    first.start()
    wait(lambda: starts(first))
    second = trainer()
    second.start()
    assert second.finished() is None
    assert second.pid == first.pid
    assert len(starts(second)) == 1
    second.kill()
    wait(first.finished)
    wait(second.finished)
    finished = second.finished()
    assert finished is not None
    assert finished.outcome == "died"


def test_a_child_that_ended_while_the_daemon_was_down_is_understood(trainer: Callable[..., Trainer]) -> None:
    """The report is enough."""
    first = trainer("report")
    first.start()
    wait(first.finished)
    finished = trainer("report").finished()
    assert finished is not None
    assert finished.outcome == "trained"


def test_a_child_without_progress_hangs(trainer: Callable[..., Trainer]) -> None:
    """The hang is counted from the last progress, and a child that is stopped dead can still be killed."""
    child = trainer()
    child.start()
    wait(lambda: starts(child))
    assert not child.hangs(30)
    pid = child.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.15)
    assert child.hangs(0.1)
    write(child.run_directory / "progress.json", Progress(phase="train", step=1, at=0.0))
    assert not child.hangs(0.1)
    child.kill()
    assert child.finished() is not None


def test_the_recipe_follows_the_strategies() -> None:
    """Replay needs rows to rehearse, GEM needs memories, EWC needs neither."""
    model = Model(base_path=Path(), engine="e", buffer=Buffer(examples=7), strategy=[Replay(ratio=0.4), Ewc()])
    recipe = recipe_of(model)
    assert (recipe.replay_ratio, recipe.memory_updates, recipe.buffer.examples) == (0.4, 0, 7)
    gem = recipe_of(Model(base_path=Path(), engine="e", strategy=[Gem(constraints=3, examples=5)]))
    assert (gem.replay_ratio, gem.memory_updates, gem.memory_examples) == (0.0, 3, 16 * 5)
