"""When an update is due: pure functions of what waits, the rules and the time."""

import math

from buffers.claims import Pending
from daemon import windows
from daemon.config import Schedule
from daemon.wording import duration

RETRY_SECONDS, RETRY_SECONDS_MAX = 60.0, 3600.0


def held_back(rules: Schedule, now: float, load: float) -> str | None:
    """Why no update may begin now, whatever is due; None when one may. `load`: of the machine, per CPU.

    An operator's `eternad update` does not ask.
    """
    closed = windows.closed_because(rules.windows, rules.blackouts, now)
    if closed is None and load > (math.inf if rules.load_max is None else rules.load_max):
        return f"the machine is busy (load {load:.1f} per CPU, {rules.load_max:g} allowed)"
    return closed


def is_due(
    waiting: Pending, rules: Schedule, now: float, *, fired: str | None = None, not_before: float = 0.0
) -> str | None:
    """Why an update should start now (`manual`, `cron`, `interval`, `threshold`, `max_age`), or None.

    `fired` is an outside reason, which needs only one waiting example. `not_before` holds back the rules of the
    configuration after a failure; an outside reason overrides it.
    """
    if not waiting.train or waiting.oldest_at is None or waiting.newest_at is None:
        return None
    if fired is not None:
        return fired
    if 0 < not_before - now <= RETRY_SECONDS_MAX:
        return None
    # a clock that was wrong has left times in the future: a distance counts, so that nothing waits until they are past
    if waiting.train >= rules.threshold_examples and abs(now - waiting.newest_at) >= rules.quiet_seconds:
        return "threshold"
    return "max_age" if abs(now - waiting.oldest_at) >= rules.max_age_seconds else None


def explain(waiting: Pending, rules: Schedule, now: float, not_before: float = 0.0) -> str:
    """What the next update of a model waits for, for a person."""
    if not waiting.train or waiting.oldest_at is None or waiting.newest_at is None:
        return "nothing waits"
    if (closed := windows.closed_because(rules.windows, rules.blackouts, now)) is not None:
        return f"{waiting.train} examples wait; {closed}"
    if now < not_before:
        return f"{waiting.train} examples wait; tries again in {duration(not_before - now)} after a failure"
    left = max(0.0, waiting.oldest_at + rules.max_age_seconds - now)
    if waiting.train < rules.threshold_examples:
        return f"{waiting.train} of {rules.threshold_examples} examples; at the latest in {duration(left)}"
    quiet = waiting.newest_at + rules.quiet_seconds - now
    return f"{waiting.train} examples; quiet in {duration(quiet)}" if quiet > 0 else f"{waiting.train} examples; due"


def retry_at(failed_in_a_row: int, last_failure: float) -> float:
    """Not before this time after failures: one minute, doubled each time, one hour at most."""
    if not failed_in_a_row:
        return 0.0
    return last_failure + min(RETRY_SECONDS * 2.0 ** (failed_in_a_row - 1), RETRY_SECONDS_MAX)
