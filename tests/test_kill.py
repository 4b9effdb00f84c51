"""SIGKILL at every step of an update, and at random: after a restart everything completes by itself, once."""

import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kill_kit import Child, check_oracle, consumed, look, scripted, wait, write_drop
from service_kit import prepare_lab

from daemon import control

CONFIG = """
library_directory = "library"
state_directory = "state"
tick_seconds = 0.02
disk_free_bytes_min = 0
run_attempts_max = 1000
[watch]
stability_seconds = 0.0
scan_seconds = 0.2
[engines.local]
urls = ["http://127.0.0.1:1"]
[models.npc]
base_path = "base"
engine = "local"
[models.npc.schedule]
threshold_examples = 5
quiet_seconds = 0.0
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in which a scripted daemon can live; what still runs afterwards is ended."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "eternad.toml").write_text(CONFIG)
    prepare_lab(tmp_path / "lab")
    yield tmp_path


def is_dead(child: Child) -> bool:
    assert child.process is not None
    return child.process.poll() == -signal.SIGKILL


def start_for_good(daemon: Child, place: Path) -> None:
    """Start it and wait until it listens to signals and orders."""
    (place / "daemon.log").write_text("")
    daemon.start()
    wait(lambda: "ready" in (place / "daemon.log").read_text(), 30, "the daemon is ready", place / "daemon.log")


STATES = ["PENDING", "TRAINING", "TRAINED", "EVALUATING", "ACCEPTED", "PUBLISHED", "LIVE"]
POINTS = [f"{state}:{side}" for state in STATES for side in ("before", "after")] + ["PUBLISHED:files"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_around_a_transition_the_update_completes_once(place: Path, point: str) -> None:
    """The daemon dies before or after the transaction of each state; the next one finishes the run."""
    daemon = scripted(place)
    write_drop(place, "a.jsonl", range(10))
    daemon.start(ETERNAD_FAILPOINT=point)
    wait(lambda: is_dead(daemon), 30, f"the daemon dies at {point}", place / "daemon.log")
    start_for_good(daemon, place)
    wait(lambda: consumed(place) == 9, 30, "the update is live", place / "daemon.log")
    assert daemon.stop() == 0
    check_oracle(place, 10)
    assert (place / "lab" / "trained").read_text().split().count("npc-00001") <= 2


@pytest.mark.parametrize("point", ["REJECTED:before", "REJECTED:after", "FAILED:before", "FAILED:after"])
def test_killed_around_an_end_nothing_is_lost_or_served(place: Path, point: str) -> None:
    """A candidate that was turned down stays so, and its examples wait."""
    (place / "lab" / "orders").write_text("bad" if point.startswith("REJECTED") else "fail")
    daemon = scripted(place)
    write_drop(place, "a.jsonl", range(10))
    daemon.start(ETERNAD_FAILPOINT=point)
    wait(lambda: is_dead(daemon), 30, f"the daemon dies at {point}", place / "daemon.log")
    start_for_good(daemon, place)

    def ended() -> bool:
        database = look(place)
        assert database is not None
        states = [row[0] for row in database.execute("SELECT state FROM run")]
        waiting = database.execute("SELECT count(*) FROM example WHERE state = 'pending'").fetchone()[0]
        database.close()
        return states == [point.split(":", maxsplit=1)[0]] and waiting == 10

    wait(ended, 30, "the run has ended and its examples wait", place / "daemon.log")
    assert daemon.stop() == 0
    assert not list((place / "state" / "versions").glob("*/*"))


@pytest.mark.parametrize("point", ["PENDING:before#2", "PENDING:after#2"])
def test_killed_around_another_attempt_the_update_completes_once(place: Path, point: str) -> None:
    """The trainer has died, and the daemon dies as it puts the run back: the next one tries it again."""
    (place / "lab" / "orders").write_text("crash")
    daemon = scripted(place)
    write_drop(place, "a.jsonl", range(10))
    daemon.start(ETERNAD_FAILPOINT=point)
    wait(lambda: is_dead(daemon), 30, f"the daemon dies at {point}", place / "daemon.log")
    (place / "lab" / "orders").unlink()
    start_for_good(daemon, place)
    wait(lambda: consumed(place) == 9, 30, "the update is live", place / "daemon.log")
    assert daemon.stop() == 0
    check_oracle(place, 10)


@pytest.mark.parametrize("point", ["CANCELLED:before", "CANCELLED:after"])
def test_killed_around_a_cancellation_the_examples_are_learned_once(place: Path, point: str) -> None:
    """Before it the run goes on, after it another one learns what waits: in both cases one version does."""
    (place / "lab" / "orders").write_text("slow")
    daemon = scripted(place)
    write_drop(place, "a.jsonl", range(10))
    daemon.start(ETERNAD_FAILPOINT=point)
    wait((place / "lab" / "trained").exists, 30, "a trainer works", place / "daemon.log")
    (place / "lab" / "orders").unlink()
    with pytest.raises(control.NotRunning):
        control.Client(control.socket_path(place / "state")).send(control.Order(action="cancel", run_id="npc-00001"))
    wait(lambda: is_dead(daemon), 30, f"the daemon dies at {point}", place / "daemon.log")
    start_for_good(daemon, place)
    wait(lambda: consumed(place) == 9, 30, "the update is live", place / "daemon.log")
    assert daemon.stop() == 0
    check_oracle(place, 10)


def kill_at_random(place: Path, seed: int, kills: int, drops: int) -> int:
    """A scripted daemon that is killed again and again while files are dropped; how often it was killed."""
    draw, daemon, killed = random.Random(seed), scripted(place), 0
    for number in range(drops):
        write_drop(place, f"{number}.jsonl", range(number * 10, number * 10 + 10))
        while killed < kills * (number + 1) // drops:
            daemon.start()
            time.sleep(draw.uniform(0.3, 1.6))
            daemon.kill()
            killed += 1
        daemon.start()
        wait(lambda n=number: consumed(place) == 9 * (n + 1), 60, "the drop is learned", place / "daemon.log")
        daemon.kill()
    start_for_good(daemon, place)
    wait(lambda: not active(place), 30, "nothing is at work", place / "daemon.log")
    assert daemon.stop() == 0
    return killed


def active(place: Path) -> bool:
    database = look(place)
    if database is None:
        return True
    try:
        return bool(
            database.execute("SELECT count(*) FROM run WHERE state NOT IN ('LIVE', 'SUPERSEDED')").fetchone()[0]
        )
    except sqlite3.OperationalError:
        return True
    finally:
        database.close()


def test_killed_at_random_everything_is_learned_once(place: Path) -> None:
    """Twelve kills over three drops."""
    assert kill_at_random(place, seed=1, kills=12, drops=3) == 12
    check_oracle(place, 30)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(3))
def test_killed_a_hundred_times_everything_is_learned_once(place: Path, seed: int) -> None:
    """A hundred kills over ten drops, three times."""
    kills = int(os.environ.get("ETERNAD_KILLS", "100"))
    assert kill_at_random(place, seed=seed, kills=kills, drops=10) == kills
    check_oracle(place, 100)
    print(json.dumps({"seed": seed, "kills": kills}))
