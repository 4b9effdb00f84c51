"""When an update is due. `is_due` and `explain` are pure; `Clock` turns cron and interval settings into fires.

APScheduler's jobs live in memory and are declared anew from the configuration at every start and reload; the last fire
of each is kept in our database, so that a fire missed while the daemon was down is made up for, once.
"""

import datetime
import queue
import time
from collections.abc import Mapping

import msgspec
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from buffers.journal import Pending
from daemon.config import Model, Schedule

RETRY_SECONDS, RETRY_SECONDS_MAX = 60.0, 3600.0


class Fire(msgspec.Struct, frozen=True):
    """A cron or interval setting has come due for a model."""

    model: str
    trigger: str
    at: float


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
    if now < not_before:
        return None
    if waiting.train >= rules.threshold_examples and now - waiting.newest_at >= rules.quiet_seconds:
        return "threshold"
    return "max_age" if now - waiting.oldest_at >= rules.max_age_seconds else None


def explain(waiting: Pending, rules: Schedule, now: float, not_before: float = 0.0) -> str:
    """What the next update of a model waits for, for a person."""
    if not waiting.train or waiting.oldest_at is None or waiting.newest_at is None:
        return "nothing waits"
    if now < not_before:
        return f"{waiting.train} examples wait; tries again in {not_before - now:.0f} s after a failure"
    left = max(0.0, waiting.oldest_at + rules.max_age_seconds - now)
    if waiting.train < rules.threshold_examples:
        return f"{waiting.train} of {rules.threshold_examples} examples; at the latest in {left:.0f} s"
    quiet = waiting.newest_at + rules.quiet_seconds - now
    return f"{waiting.train} examples; quiet in {quiet:.0f} s" if quiet > 0 else f"{waiting.train} examples; due"


def retry_at(failed_in_a_row: int, last_failure: float) -> float:
    """Not before this time after failures: one minute, doubled each time, one hour at most."""
    if not failed_in_a_row:
        return 0.0
    return last_failure + min(RETRY_SECONDS * 2.0 ** (failed_in_a_row - 1), RETRY_SECONDS_MAX)


class Clock:
    """Cron and interval fires of all models, handed to the daemon's loop through a queue."""

    def __init__(self) -> None:
        self.fires: queue.SimpleQueue[Fire] = queue.SimpleQueue()
        # a stall or a suspend must cost lateness, never the fire: APScheduler's own grace is one second
        self._scheduler = BackgroundScheduler(
            job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1}
        )

    def start(self, models: Mapping[str, Model], last_fires: Mapping[str, float]) -> None:
        """Declare the jobs of this configuration and run. `last_fires`: `MODEL/TRIGGER` -> seconds since the epoch."""
        self.declare(models, last_fires)
        self._scheduler.start()

    def declare(self, models: Mapping[str, Model], last_fires: Mapping[str, float]) -> None:
        """Replace all jobs, for a start or a reload."""
        self._scheduler.remove_all_jobs()
        for name, model in models.items():
            if model.schedule.cron is not None:
                self._add(name, "cron", CronTrigger.from_crontab(model.schedule.cron), last_fires)
            if model.schedule.interval_seconds is not None:
                trigger = IntervalTrigger(seconds=model.schedule.interval_seconds)
                self._add(name, "interval", trigger, last_fires)

    def _add(
        self, model: str, kind: str, trigger: CronTrigger | IntervalTrigger, last_fires: Mapping[str, float]
    ) -> None:
        last, extra = last_fires.get(f"{model}/{kind}"), {}
        if last is not None:
            previous = datetime.datetime.fromtimestamp(last, trigger.timezone)
            missed = trigger.get_next_fire_time(previous, previous)
            if missed is not None and missed.timestamp() <= time.time():
                extra["next_run_time"] = missed
        self._scheduler.add_job(self._fire, trigger, args=(model, kind), id=f"{model}/{kind}", **extra)

    def _fire(self, model: str, kind: str) -> None:
        self.fires.put(Fire(model, kind, time.time()))

    def drain(self) -> list[Fire]:
        """The fires since the last call."""
        fires = []
        while not self.fires.empty():
            fires.append(self.fires.get())
        return fires

    def close(self) -> None:
        """Stop the scheduler's thread."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
