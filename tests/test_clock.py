"""Cron and interval settings become fires, also those missed while the daemon was down."""

import time
from pathlib import Path

from daemon.clock import Clock
from daemon.config import Model, Schedule


def model(**schedule: object) -> Model:
    return Model(base_path=Path(), engine="e", schedule=Schedule(**schedule))  # type: ignore[arg-type]


def wait_for_fires(clock: Clock, seconds: float = 5.0) -> list[tuple[str, str]]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if fires := clock.drain():
            return [(fire.model, fire.trigger) for fire in fires]
        time.sleep(0.02)
    return []


def test_a_fire_missed_while_the_daemon_was_down_is_made_up_for_once() -> None:
    """The last fire was two days ago: one nightly update is started now, not two."""
    clock = Clock()
    models = {"npc": model(cron="0 4 * * *")}
    clock.start(models, {"npc/cron": time.time() - 2 * 86400})
    try:
        assert wait_for_fires(clock) == [("npc", "cron")]
        assert clock.drain() == []
    finally:
        clock.close()


def test_without_a_missed_fire_nothing_fires_at_the_start() -> None:
    """A model that never fired waits for its time."""
    clock = Clock()
    clock.start({"npc": model(cron="0 4 1 1 *"), "book": model(interval_seconds=3600.0)}, {})
    try:
        assert wait_for_fires(clock, 0.3) == []
    finally:
        clock.close()


def test_a_reload_replaces_the_jobs() -> None:
    """An interval that is taken out of the configuration no longer fires; one that is put in does."""
    clock = Clock()
    clock.start({"npc": model(interval_seconds=3600.0)}, {})
    try:
        clock.declare({"book": model(interval_seconds=0.05)}, {})
        assert wait_for_fires(clock)[0] == ("book", "interval")
    finally:
        clock.close()
