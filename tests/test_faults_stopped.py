"""A daemon that was stopped (SIGSTOP) while thousands of files came: the kernel's queue overflows, nothing is lost."""

import signal
from pathlib import Path
from typing import Any

import pytest
from kill_kit import Child, look, scripted, wait
from service_kit import prepare_lab
from test_kill import CONFIG, start_for_good

from daemon.control import Client, socket_path

QUEUE = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
EVENTS_A_SAVE = 2  # modified and closed; the first time also created
PATIENT = CONFIG.replace("threshold_examples = 5", "threshold_examples = 1000000").replace(
    "scan_seconds = 0.2", "scan_seconds = 3600"
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory for a daemon that scans at its start, and afterwards only if it is told that events were lost."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "eternad.toml").write_text(PATIENT)
    (tmp_path / "library" / "content" / "npc").mkdir(parents=True)
    prepare_lab(tmp_path / "lab")
    return tmp_path


def known(place: Path) -> int:
    """Examples in the journal."""
    database = look(place)
    assert database is not None
    (number,) = database.execute("SELECT count(*) FROM example").fetchone()
    database.close()
    return int(number)


def counters(place: Path) -> dict[str, Any]:
    """What the daemon counts."""
    found: dict[str, Any] = Client(socket_path(place / "state")).status()["counters"]
    return found


def drop_while_stopped(daemon: Child, place: Path, files: int, saves: int) -> None:
    """So many files of one example each, saved so many times, while the process cannot run."""
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)
    for _ in range(saves):
        for each in range(files):
            row = f'{{"prompt": "Who is {each}?", "completion": "Nobody, {each}."}}\n'
            (place / "library" / "content" / "npc" / f"{each}.jsonl").write_text(row)
    daemon.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("files", "saves"),
    [
        pytest.param(1000, 1 + QUEUE // (1000 * EVENTS_A_SAVE), id="a thousand"),
        pytest.param(20_000, 1, marks=[pytest.mark.slow, pytest.mark.timeout(900)], id="twenty thousand"),
    ],
)
def test_files_that_came_while_the_daemon_was_stopped_are_all_taken_in(place: Path, files: int, saves: int) -> None:
    """The kernel lost events: that is counted once, followed by one scan, and every file is in the journal once."""
    daemon = scripted(place)
    start_for_good(daemon, place)
    try:
        before = counters(place)
        drop_while_stopped(daemon, place, files, saves)
        wait(lambda: known(place) >= files, 800, "all are taken in", place / "daemon.log")
        after = counters(place)
    finally:
        assert daemon.stop() == 0
    assert known(place) == files
    assert after["overflow"] - before["overflow"] == 1
    assert after["scans"] - before["scans"] == 1
