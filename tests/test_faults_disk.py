"""A full disk, a read-only one, and the ballast: nothing half done is visible, and everything goes on by itself."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults_kit import Make, engine_fixture, fill, lab_fixture, make_fixture, small_disk_fixture, state_of
from kill_kit import consumed, scripted, wait, write_drop
from service_kit import MemoryEngine, drop, prepare_lab, turn_until
from test_kill import CONFIG, start_for_good

from buffers import journal
from daemon import publish
from daemon.machine.ballast import Ballast
from daemon.service import Service
from daemon.service.patience import PAUSE_SECONDS_MAX
from daemon.state import runs
from daemon.state.trouble import trouble_of

fixtures = (engine_fixture, lab_fixture, make_fixture, small_disk_fixture)


def turns(service: Service, number: int, start: float) -> None:
    """Let the loop turn with a clock that no back-off outlasts."""
    for step in range(number):
        service.turn(start + step * (PAUSE_SECONDS_MAX + 1))


def integrity(service: Service) -> str:
    return str(service.house.database.execute("PRAGMA integrity_check").fetchone()[0])


def test_a_disk_that_fills_up_while_files_are_taken_in_holds_nothing_up_for_good(
    small_disk: Path, make: Make, tmp_path: Path
) -> None:
    """No example of a file that did not fit is visible; with room again all of it is learned, without a restart."""
    service = make(small_disk / "state")
    service.start()
    write_drop(tmp_path, "a.jsonl", range(3000))
    filler, now = fill(small_disk, left=200_000), time.time()
    turns(service, 4, now)
    counters = service.snapshot()["counters"]
    assert (counters["disk_full"], counters["turn_failures"]) >= (3, 3)
    assert "make room" in service.snapshot()["degraded"]
    assert journal.counts(service.house.database, "npc") == {}
    filler.unlink()
    turns(service, 3, now + 1000)
    assert sum(journal.counts(service.house.database, "npc").values()) == 3000
    assert service.snapshot()["degraded"] is None
    assert integrity(service) == "ok"


def test_a_disk_that_fills_up_while_publishing_leaves_no_half_version(
    small_disk: Path, make: Make, engine: MemoryEngine, lab: Path
) -> None:
    """The run stays ACCEPTED, nothing is trained twice, and with room again it goes live by itself."""
    service = make(small_disk / "state")
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "TRAINING")
    run, deadline = service.updates.directory(runs.active(service.house.database)[0]), time.monotonic() + 20
    while not (run / "report.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)  # the daemon does not look meanwhile
    trainer = service.updates._trainer(runs.active(service.house.database)[0])
    while trainer.pid is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    publisher, full = publish._write_durably, []

    def fill_up_first(path: Path, data: bytes) -> None:
        if not full:
            full.append(fill(small_disk, left=0))
        publisher(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "_write_durably", fill_up_first)
        for _ in range(3):
            turns(service, 1, time.time())
    assert state_of(service) == "ACCEPTED"
    assert not list((service.house.versions / "npc").glob("[0-9]*"))
    full[0].unlink()
    turn_until(service, lambda: state_of(service) == "LIVE")
    assert (lab / "trained").read_text().split() == ["npc-00001"]
    assert engine.table == {"npc": "npc@0001"}
    assert integrity(service) == "ok"


def use_up_inodes(place: Path) -> list[Path]:
    """Empty files until there can be no more."""
    made: list[Path] = []
    try:
        while True:
            made.append(place / f"inode.{len(made)}")
            made[-1].touch()
    except OSError:
        return made[:-1]


def test_without_an_inode_left_nothing_is_published_until_there_is_one(
    small_disk: Path, make: Make, engine: MemoryEngine, lab: Path
) -> None:
    """There are bytes enough, but no file can be made: the same answer as to a full disk."""
    service = make(small_disk / "state")
    drop(service, range(10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.updates, "_publish", lambda run: None)
        service.updates._steps["ACCEPTED"] = lambda run: service.updates._publish(run)
        turn_until(service, lambda: state_of(service) == "ACCEPTED")
    used = use_up_inodes(small_disk)
    turns(service, 3, time.time())
    assert state_of(service) == "ACCEPTED"
    assert service.patience.counts["disk_full"] >= 2
    for path in used:
        path.unlink()
    turn_until(service, lambda: state_of(service) == "LIVE")
    assert (lab / "trained").read_text().split() == ["npc-00001"]


def test_no_trainer_starts_on_a_disk_that_is_nearly_full(
    make: Make, monkeypatch: pytest.MonkeyPatch, lab: Path
) -> None:
    """A run that waits to be tried again waits for room as well."""
    service = make()
    drop(service, range(10))
    run = service.updates.start("npc", "manual")
    assert run is not None
    monkeypatch.setattr(service.house, "disk_is_low", lambda: True)
    service.tick(time.time())
    assert (state_of(service), (lab / "trained").exists()) == ("PENDING", False)
    monkeypatch.undo()
    monkeypatch.setattr("daemon.update.COMMAND", [sys.executable, str(lab / "trainer.py")])
    turn_until(service, lambda: state_of(service) == "LIVE")


def test_a_full_disk_is_logged_once_a_minute(
    small_disk: Path, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line per minute says what to do, however often it is tried."""
    service = make(small_disk / "state")
    service.start()
    write_drop(tmp_path, "a.jsonl", range(3000))
    fill(small_disk, left=100_000)
    with caplog.at_level(logging.ERROR, "eternad"):
        for second in range(60):
            service.turn(1000.0 + second)
    assert 3 <= service.patience.counts["turn_failures"] <= 10
    assert len([record for record in caplog.records if "the disk is full" in record.message]) == 1


def test_the_ballast_is_given_up_on_a_full_disk_and_made_again(small_disk: Path, make: Make, tmp_path: Path) -> None:
    """What it frees lets the daemon clean up; it comes back when there is room twice over."""
    floor = 512 * 1024
    service = make(small_disk / "state", {"disk_free_bytes_min": float(floor)})
    ballast = service.patience.ballast.path
    service.turn(1000.0)
    assert ballast.stat().st_blocks * 512 >= floor
    service.start()
    leftover = service.house.versions / "npc" / ".0009.tmp"
    leftover.mkdir(parents=True)
    (leftover / "adapter_model.safetensors").write_bytes(b"x" * 100_000)
    write_drop(tmp_path, "a.jsonl", range(3000))
    filler = fill(small_disk, left=50_000)
    turns(service, 2, 2000.0)
    assert not ballast.exists() and not leftover.exists()
    assert service.snapshot()["counters"]["ballast_released"] == 1
    filler.unlink()
    turns(service, 3, 4000.0)
    assert ballast.exists()
    assert sum(journal.counts(service.house.database, "npc").values()) == 3000


def test_the_ballast_takes_no_room_that_is_not_there(small_disk: Path) -> None:
    """Neither beside a low floor nor halfway: what does not fit is not begun."""
    assert not Ballast(small_disk / "ballast", 3 * 2**20).keep()
    assert not Ballast(small_disk / "ballast", 0).keep()
    assert list(small_disk.iterdir()) == []
    assert Ballast(small_disk / "ballast", 2**20).keep()
    assert Ballast(small_disk / "ballast", 2**20).release() == 2**20
    assert Ballast(small_disk / "ballast", 2**20).release() == 0


@contextmanager
def read_only(service: Service) -> Iterator[None]:
    """What SQLite says of a file system that the kernel has turned read-only (`errors=remount-ro`): no write."""
    service.house.database.execute("PRAGMA query_only=ON")
    try:
        yield
    finally:
        service.house.database.execute("PRAGMA query_only=OFF")


def test_a_file_system_that_turns_read_only_is_waited_for(make: Make, engine: MemoryEngine, tmp_path: Path) -> None:
    """Status lives and says so, the engine goes on serving, and after the remount the drop is learned."""
    service = make()
    service.start()
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "LIVE")
    now = time.time()
    with read_only(service):
        write_drop(tmp_path, "a.jsonl", range(100, 110))
        turns(service, 4, now)
        assert "read-only" in service.snapshot()["degraded"]
        assert service.snapshot()["counters"]["turn_failures"] >= 3
        assert engine.table == {"npc": "npc@0001"}
    turns(service, 2, now + 1000)
    turn_until(service, lambda: engine.table == {"npc": "npc@0002"})


def test_a_start_on_a_read_only_file_system_is_one_sentence(small_disk: Path, tmp_path: Path) -> None:
    """Exit 75 (EX_TEMPFAIL) and what to do, for a state directory that is there and for one that is not."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    config = tmp_path / "eternad.toml"
    config.write_text(
        f'library_directory = "library"\nstate_directory = "{small_disk}/state"\n[engines.local]\n'
        'urls = ["http://127.0.0.1:9"]\n[models.npc]\nbase_path = "base"\nengine = "local"\n'
    )
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "daemon", "run", "--config", str(config)], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "mount it writable" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_trouble_of_the_disk_is_raised(make: Make) -> None:
    """A restart may help there; and a damaged database must not be worked on."""
    service = make()
    for error in (FileNotFoundError(2, "gone"), PermissionError(13, "no")):
        assert trouble_of(error) is None

        def work(_now: float, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            service.patience.turn(work, 0.0)
    assert shutil.disk_usage(service.house.runs).free > 0
    assert os.access(service.house.runs, os.W_OK)


def test_the_daemon_itself_lives_through_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """The process goes on, `status` says why nothing moves, and the drop is learned once there is room."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "eternad.toml").write_text(CONFIG.replace('"state"', f'"{small_disk}/state"'))
    prepare_lab(tmp_path / "lab")
    (tmp_path / "state").symlink_to(small_disk / "state", target_is_directory=True)
    daemon = scripted(tmp_path)
    start_for_good(daemon, tmp_path)
    try:
        filler = fill(small_disk, left=100_000)
        write_drop(tmp_path, "a.jsonl", range(3000))
        wait(lambda: "the disk is full" in said_by_status(tmp_path), 30, "status says it", tmp_path / "daemon.log")
        assert consumed(tmp_path) == 0
        filler.unlink()
        wait(lambda: consumed(tmp_path) > 0, 60, "the drop is learned", tmp_path / "daemon.log")
        assert daemon.process is not None and daemon.process.poll() is None
    finally:
        assert daemon.stop() == 0
    assert "Traceback" not in (tmp_path / "daemon.log").read_text()


def said_by_status(place: Path) -> str:
    command = [sys.executable, "-m", "daemon", "status", "--config", str(place / "eternad.toml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
