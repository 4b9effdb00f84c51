"""Wrong clocks and a library that goes away, seen by the whole service."""

import os
import time
from pathlib import Path

from faults_kit import Make, engine_fixture, lab_fixture, make_fixture, state_of
from kill_kit import write_drop
from service_kit import MemoryEngine, drop, turn_until

from buffers import claims, journal
from daemon import schedule
from daemon.config import Schedule
from daemon.service import Service
from daemon.state import runs

fixtures = (engine_fixture, lab_fixture, make_fixture)
HOUR, YEAR = 3600.0, 365 * 86400.0


def turn_at(service: Service, offset: float, wanted: str, seconds: float = 20.0) -> None:
    """Turns under a clock that is `offset` seconds wrong, until the latest run is in the state `wanted`."""
    deadline = time.monotonic() + seconds
    while state_of(service) != wanted:
        service.tick(time.time() + offset)
        assert time.monotonic() < deadline, f"{state_of(service)}, not {wanted}"
        time.sleep(0.01)


def test_a_clock_that_jumps_a_year_ahead_and_back_gives_one_run_and_starves_nothing(
    make: Make, engine: MemoryEngine, tmp_path: Path
) -> None:
    """One coalesced update of what waited, no storm of further ones; back in the present the next drop is learned."""
    service = make()
    service.start()
    drop(service, range(3))  # fewer than the threshold: only its age makes it due
    service.tick(time.time())
    assert state_of(service) == ""
    turn_at(service, YEAR, "LIVE")
    for hour in range(48):
        service.tick(time.time() + YEAR + hour * HOUR)
    assert len(runs.recent(service.house.database, "npc")) == 1
    write_drop(tmp_path, "a.jsonl", range(100, 110))
    service.tick(time.time() + YEAR + 50 * HOUR)
    service.tick(time.time() + YEAR + 50 * HOUR)  # taken in with a time of next year
    assert engine.history[-1] == "npc@0001"
    engine.restart()
    turn_until(service, lambda: engine.table.get("npc") == "npc@0002")
    assert len(runs.recent(service.house.database, "npc")) == 2


def test_an_hour_back_holds_no_drop_up(make: Make, tmp_path: Path) -> None:
    """Daylight saving done wrongly: what came in an hour "later" is learned now, once."""
    service = make(schedule=Schedule(threshold_examples=5, quiet_seconds=30.0))
    service.start()
    write_drop(tmp_path, "a.jsonl", range(10))
    deadline = time.monotonic() + 20
    while not journal.counts(service.house.database, "npc") and time.monotonic() < deadline:
        service.tick(time.time())
    assert state_of(service) == ""  # not quiet for long enough
    turn_at(service, -HOUR, "LIVE")
    assert len(runs.recent(service.house.database, "npc")) == 1


def test_a_failure_of_next_year_holds_nothing_back() -> None:
    """What a wrong clock has written down is waited for no longer than any other failure."""
    waiting = claims.Pending(train=10, heldout=0, oldest_at=0.0, newest_at=0.0)
    rules, failed_at = Schedule(threshold_examples=5), YEAR
    assert schedule.is_due(waiting, rules, 1000.0, not_before=schedule.retry_at(3, failed_at)) == "threshold"
    assert schedule.is_due(waiting, rules, 1000.0, not_before=schedule.retry_at(3, 990.0)) is None


def test_a_clock_set_back_reckons_cron_anew(make: Make) -> None:
    """Else a nightly update would wait until the night that the wrong clock had shown."""
    service = make(schedule=Schedule(threshold_examples=1000, cron="0 3 * * *"))
    service.start()
    job = service.clock._scheduler.get_jobs()[0]
    job.modify(next_run_time=job.next_run_time.replace(year=job.next_run_time.year + 1))
    service.tick(time.time() + YEAR)
    service.tick(time.time())
    (job,) = service.clock._scheduler.get_jobs()
    assert job.next_run_time.timestamp() - time.time() < 25 * HOUR


def test_after_a_suspend_of_eight_hours_one_run_makes_up_for_it(make: Make) -> None:
    """An interval of ten minutes fires once for all that was slept through."""
    service = make(schedule=Schedule(threshold_examples=1000, interval_seconds=600))
    drop(service, range(3))
    service.clock.declare(service.house.config.models, {"npc/interval": time.time() - 8 * HOUR})
    service.clock._scheduler.start()
    turn_until(service, lambda: state_of(service) == "LIVE")
    drop(service, range(3, 6))
    for _ in range(20):
        service.tick(time.time())
        time.sleep(0.02)
    assert len(runs.recent(service.house.database, "npc")) == 1


def test_a_library_that_goes_away_is_said_and_its_examples_stay(make: Make, tmp_path: Path) -> None:
    """Degraded, not "everything was deleted"; back in its place, the next drop is learned without a restart."""
    service = make()
    service.start()
    write_drop(tmp_path, "a.jsonl", range(10))
    turn_until(service, lambda: state_of(service) == "LIVE")
    library = tmp_path / "library"
    library.rename(tmp_path / "elsewhere")
    service.tick(time.time())
    assert "put it back" in service.snapshot()["degraded"]
    library.mkdir()
    service.tick(time.time())
    assert "another directory" in service.snapshot()["degraded"]
    assert sum(journal.counts(service.house.database, "npc").values()) == 10
    library.rmdir()
    os.rename(tmp_path / "elsewhere", library)  # noqa: PTH104 - back as `mv` does it
    write_drop(tmp_path, "b.jsonl", range(100, 110))
    turn_until(service, lambda: len(runs.recent(service.house.database, "npc")) == 2)
    turn_until(service, lambda: state_of(service) == "LIVE")
    assert service.snapshot()["degraded"] is None
