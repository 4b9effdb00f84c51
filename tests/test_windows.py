"""When updates may begin: windows, blackouts, a busy machine, a GPU that another program has."""

import datetime
import fcntl
from pathlib import Path

import pytest
from faults_kit import Make, engine_fixture, lab_fixture, make_fixture, state_of
from hypothesis import given
from hypothesis import strategies as st
from operator_kit import make_config as make_toml
from service_kit import drop, turn_until

from daemon import windows
from daemon.clock import Fire
from daemon.config import ConfigError, Schedule, load
from daemon.schedule import held_back
from daemon.service import Service
from daemon.state import runs

__all__ = ["engine_fixture", "lab_fixture", "make_fixture"]

SUNDAY = datetime.datetime(2026, 11, 22)


def at(hour: int, minute: int = 0, day: int = 0) -> datetime.datetime:
    """A moment of the week that begins on Monday, 16 November 2026 (`day` 6: Sunday)."""
    return datetime.datetime(2026, 11, 16 + day, hour, minute)


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("22:00-06:00", [at(22), at(23, 59), at(0), at(5, 59)], [at(6), at(21, 59), at(12)]),
        ("mon-fri 20:00-24:00", [at(20), at(23, 59, 4)], [at(19, 59), at(0, 0, 1), at(21, 0, 5)]),
        ("sat,sun 00:00-24:00", [at(0, 0, 5), at(23, 59, 6)], [at(23, 59, 4), at(0, 0, 0)]),
        ("fri 22:00-06:00", [at(22, 0, 4), at(5, 59, 5)], [at(5, 59, 4), at(22, 0, 5)]),
        ("sat-mon 01:00-02:00", [at(1, 0, 5), at(1, 0, 6), at(1, 0, 0)], [at(1, 0, 1), at(1, 0, 4)]),
    ],
)
def test_windows(window: str, inside: list[datetime.datetime], outside: list[datetime.datetime]) -> None:
    """Days and times; over midnight a window belongs to the day on which it begins."""
    assert all(windows.is_open([window], [], moment) for moment in inside)
    assert not any(windows.is_open([window], [], moment) for moment in outside)


@given(st.integers(0, 1439), st.integers(1, 1439), st.datetimes(datetime.datetime(2020, 1, 1)))
def test_a_window_and_its_complement_share_no_minute(start: int, length: int, moment: datetime.datetime) -> None:
    """Whatever the window: every moment is in it or in the rest of the day, never in both."""
    end = (start + length) % 1440
    texts = [f"{a // 60:02}:{a % 60:02}-{b // 60:02}:{b % 60:02}" for a, b in ((start, end), (end, start))]
    assert windows.is_open(texts[:1], [], moment) != windows.is_open(texts[1:], [], moment)


def test_a_blackout_closes_whole_days_and_windows_too() -> None:
    """From the first to the last day; several windows are one or the other."""
    blackouts = ["2026-11-22", "2026-12-24..2027-01-02"]
    assert windows.is_open([], blackouts, at(23, 59, 5))
    assert not windows.is_open([], blackouts, at(0, 0, 6))
    assert not windows.is_open(["00:00-24:00"], blackouts, datetime.datetime(2027, 1, 2, 23))
    assert windows.is_open(["01:00-02:00", "03:00-04:00"], [], at(3, 30))


@pytest.mark.parametrize(
    "text", ["22-06", "22:00-06:60", "24:00-06:00", "06:00-06:00", "26:00-27:00", "mo 10:00-11:00", "mon- 10:00-11:00"]
)
def test_what_is_no_window_is_said(tmp_path: Path, text: str) -> None:
    """In the configuration, in one sentence that names the text."""
    path = make_toml(tmp_path)
    path.write_text(path.read_text() + f'[models.npc.schedule]\nwindows = ["{text}"]\n')
    with pytest.raises(ConfigError, match=r"\[models\.npc\]\.schedule: `" + text):
        load(path)


@pytest.mark.parametrize("text", ["24.12.2026", "2026-02-30", "2026-12-24..2026-12-23"])
def test_what_is_no_blackout_is_said(tmp_path: Path, text: str) -> None:
    """Dates as ISO 8601 writes them."""
    assert text in (windows.problem([], [text]) or "")


def test_a_busy_machine_is_left_alone() -> None:
    """`load_max`; without it no load is too high."""
    assert held_back(Schedule(load_max=0.5), 1e9, 0.4) is None
    assert "load 0.6" in (held_back(Schedule(load_max=0.5), 1e9, 0.6) or "")
    assert held_back(Schedule(), 1e9, 99.0) is None


def seconds(moment: datetime.datetime) -> float:
    return moment.timestamp()


def test_the_daemon_waits_for_its_window(make: Make) -> None:
    """What is due outside waits, and says why; it begins when the window opens."""
    schedule = Schedule(threshold_examples=5, quiet_seconds=0.0, windows=["02:00-03:00"])
    service = make(schedule=schedule)
    drop(service, range(10))
    service.start_due(seconds(at(1, 59)))
    assert state_of(service) == ""
    service.start_due(seconds(at(2)))
    assert state_of(service) == "TRAINING"


def test_a_fire_outside_the_window_is_kept_through_a_restart(make: Make) -> None:
    """Cron says noon, the window says night: one update at night, and only one."""
    schedule = Schedule(threshold_examples=1000, max_age_seconds=1e9, windows=["02:00-03:00"], cron="0 12 * * *")
    service = make(schedule=schedule)
    drop(service, range(10))
    service.clock.fires.put(Fire("npc", "cron", seconds(at(12))))
    service.start_due(seconds(at(12)))
    service = make(schedule=schedule)
    service.start_due(seconds(at(1, 0, 1)))
    assert state_of(service) == ""
    service.start_due(seconds(at(2, 0, 1)))
    turn_until(service, lambda: state_of(service) == "LIVE")
    drop(service, range(20, 30))
    service.start_due(seconds(at(2, 30, 1)))
    assert state_of(service) == "LIVE"


def waits_for_the_gpu(service: Service) -> bool:
    service.updates.advance()
    return state_of(service) == "PENDING"


def test_a_trainer_waits_for_whoever_holds_the_gpu(make: Make, tmp_path: Path, lab: Path) -> None:
    """While another program holds `gpu_lock_file` the run waits; then the trainer holds it for as long as it lives."""
    path = tmp_path / "gpu.lock"
    service = make(None, {"gpu_lock_file": path})
    (lab / "orders").write_text("slow")
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        drop(service, range(10))
        service.updates.start("npc", "manual")
        assert waits_for_the_gpu(service) and waits_for_the_gpu(service)
    service.updates.advance()
    assert state_of(service) == "TRAINING"
    with path.open("w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        service.updates.cancel("npc-00001")
        fcntl.flock(other, fcntl.LOCK_EX)


def test_a_fire_during_a_run_is_kept_for_its_end(make: Make, lab: Path) -> None:
    """A run that takes longer than the interval costs lateness, not the next run; fires in between count once."""
    schedule = Schedule(threshold_examples=1000, max_age_seconds=1e9, interval_seconds=1e6)
    service = make(schedule=schedule)
    (lab / "orders").write_text("slow")
    drop(service, range(10))
    service.clock.fires.put(Fire("npc", "interval", 1.8e9))
    service.start_due(1.8e9)
    assert state_of(service) == "TRAINING"
    drop(service, range(20, 30))
    for later in (1.0, 2.0):
        service.clock.fires.put(Fire("npc", "interval", 1.8e9 + later))
        service.start_due(1.8e9 + later)
    (lab / "orders").write_text("")
    service.updates.cancel("npc-00001")
    turn_until(service, lambda: state_of(service) == "LIVE")
    drop(service, range(40, 50))
    service.start_due(1.8e9 + 3.0)
    assert [run.state for run in runs.recent(service.house.database, "npc")] == ["LIVE", "CANCELLED"]


def test_a_fire_with_nothing_to_learn_is_not_kept(make: Make) -> None:
    """What comes in later waits for the next fire."""
    service = make(schedule=Schedule(threshold_examples=1000, max_age_seconds=1e9, windows=["02:00-03:00"]))
    service.clock.fires.put(Fire("npc", "cron", seconds(at(12))))
    service.start_due(seconds(at(12)))
    service.start_due(seconds(at(2, 0, 1)))
    drop(service, range(10))
    service.start_due(seconds(at(2, 1, 1)))
    assert state_of(service) == ""
