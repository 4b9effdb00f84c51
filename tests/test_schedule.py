"""When an update is due."""

import time

from buffers.journal import Pending
from daemon.config import Model, Schedule
from daemon.schedule import Clock, explain, is_due, retry_at

RULES = Schedule(threshold_examples=10, quiet_seconds=30, max_age_seconds=1000)


def waiting(train: int, oldest: float = 0.0, newest: float = 0.0) -> Pending:
    return Pending(train=train, heldout=0, oldest_at=oldest, newest_at=newest)


def test_nothing_waits_then_nothing_is_due() -> None:
    """Not even an operator's wish starts an update on nothing."""
    empty = Pending(train=0, heldout=3, oldest_at=None, newest_at=None)
    assert is_due(empty, RULES, now=1e9, fired="manual") is None
    assert explain(empty, RULES, now=1e9) == "nothing waits"


def test_threshold_needs_quiet() -> None:
    """Enough examples start an update once the writer has been quiet, not in the middle of a batch."""
    assert is_due(waiting(10, newest=100), RULES, now=129) is None
    assert "quiet in 1 s" in explain(waiting(10, newest=100), RULES, now=129)
    assert is_due(waiting(10, newest=100), RULES, now=130) == "threshold"
    assert is_due(waiting(9, newest=100), RULES, now=130) is None
    assert "9 of 10" in explain(waiting(9, newest=100), RULES, now=130)


def test_max_age_overrides_threshold_and_quiet() -> None:
    """One example that has waited long enough is learned, however few there are and however busy the writer is."""
    assert is_due(waiting(1, oldest=0, newest=999), RULES, now=999) is None
    assert is_due(waiting(1, oldest=0, newest=999), RULES, now=1000) == "max_age"


def test_a_failure_holds_back_the_rules_but_not_an_operator() -> None:
    """After a failed run the schedule waits, longer each time; a manual start does not."""
    due = waiting(10, newest=0)
    assert is_due(due, RULES, now=100, not_before=200) is None
    assert is_due(due, RULES, now=100, not_before=200, fired="manual") == "manual"
    assert retry_at(0, 50.0) == 0.0
    assert [retry_at(count, 0.0) for count in (1, 2, 3, 10)] == [60.0, 120.0, 240.0, 3600.0]


def model(**schedule: object) -> Model:
    from pathlib import Path

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
