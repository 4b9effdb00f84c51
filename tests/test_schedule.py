"""When an update is due."""

from buffers.claims import Pending
from daemon.config import Schedule
from daemon.schedule import explain, is_due, retry_at

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
