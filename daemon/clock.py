"""Turns cron and interval settings into fires, by APScheduler.

Its jobs live in memory and are declared anew from the configuration at every start and reload; the last fire of each is
kept in our database, so that a fire missed while the daemon was down is made up for, once.
"""

import datetime
import queue
import time
from collections.abc import Mapping

import msgspec
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from daemon.config import Model


class Fire(msgspec.Struct, frozen=True):
    """A cron or interval setting has come due for a model."""

    model: str
    trigger: str
    at: float


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
