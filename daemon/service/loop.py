"""The daemon's loop: `tick(now)` reads like the way of the data, and can be called by a test without any waiting."""

import os
import queue
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon import config as configuration
from daemon import schedule
from daemon.clock import Clock
from daemon.config import Config, ConfigError
from daemon.control import Command, Commands
from daemon.machine import sd_notify
from daemon.service.desk import Desk
from daemon.service.house import House, log
from daemon.service.intake import Intake
from daemon.service.keeping import Keeping
from daemon.service.orders import Orders, Said
from daemon.service.patience import Patience
from daemon.service.rollouts import Rollouts
from daemon.service.searches import Searches
from daemon.service.serving import Serving
from daemon.service.telling import Telling
from daemon.service.updates import Updates
from daemon.state import runs
from daemon.state.database import set_setting, setting, transaction
from daemon.state.waiting import waiting

CLOCK_STEP_SECONDS = 60.0
"""Less than that is time synchronisation at its usual work."""


class Service:
    """Everything that runs inside the daemon."""

    def __init__(self, config: Config, config_path: Path) -> None:
        self.config_path, self.started_at, self._turned_at = config_path, time.time(), 0.0
        self.house = House(config)
        self.serving = Serving(self.house)
        self.rollouts = Rollouts(self.house, self.serving)
        self.updates = Updates(self.house, self.serving, self.rollouts)
        self.keeping = Keeping(self.house, self.serving)
        self.searches = Searches(self.house, config_path, self.reload)
        self.intake = Intake(self.house)
        self.patience = Patience(self.house, lambda: self.keeping.carry_out(self.keeping.plan()))
        self.telling = Telling(self.house, config_path)
        self.reloads = Counter[str]()
        self.clock = Clock()
        self.commands: Commands = queue.Queue()
        self.orders = Orders(self.house, self.updates, self.serving, self.rollouts)
        self.orders.actions |= {
            "scan": self.intake.scan,
            "retry": self.intake.retry,
            "drop": self.intake.drop,
            "gc": self._sweep,
            "reload": lambda _: self.reload(),
            **Desk(self.house, self.updates.cancel).actions(),
        }

    def start(self) -> None:
        """Begin to watch and to keep time."""
        self.intake.watch()
        self.clock.start(self.house.config.models, self._last_fires())

    def turn(self, now: float) -> None:
        """One tick, unless the disk is full or read-only: then it is tried again, with growing pauses."""
        self.patience.turn(self.tick, now)

    def tick(self, now: float) -> None:
        """One turn: take in what was dropped, move runs on, start what is due, keep engines on their version."""
        self._follow_the_clock(now)
        self.intake.take_in(now)
        self.updates.advance()
        self.start_due(now)
        self.serving.reconcile(now)
        self.keeping.sweep(now)
        self.searches.advance(now)
        self.telling.turn(now)

    def _follow_the_clock(self, now: float) -> None:
        """A clock that was set back leaves cron's next fire far in the future: it is reckoned anew."""
        if now < self._turned_at - CLOCK_STEP_SECONDS:
            log.warning("the clock was set back by %.0f s", self._turned_at - now)
            self.clock.declare(self.house.config.models, self._last_fires())
        self._turned_at = now

    @property
    def pause_seconds(self) -> float:
        """Until the next turn: hardly any while more waits to be taken in than one turn could."""
        return 0.001 if self.intake.is_behind else self.house.config.tick_seconds

    def wait(self, seconds: float) -> None:
        """Until the next turn is due; orders of operators are carried out at once."""
        command: Command | None
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                command = self.commands.get(timeout=left)
            except queue.Empty:
                return
            self.orders.carry_out(command)

    def start_due(self, now: float) -> None:
        """Start the runs that are due, one per model, none while paused or while the disk is nearly full."""
        fired, load = self._fired(now), os.getloadavg()[0] / (os.cpu_count() or 1)
        busy = {run.model for run in runs.active(self.house.database)}
        for name, model in self.house.config.models.items():
            is_held = name in busy or self.is_paused(name) or self.disk_is_low()
            if is_held or schedule.held_back(model.schedule, now, load) is not None:
                self._hold(fired, name)
                continue
            found = waiting(self.house.database, name, self.house.config.trust)
            not_before = schedule.retry_at(*runs.failures_in_a_row(self.house.database, name))
            fire = fired.get(name) or self._held(name)
            trigger = schedule.is_due(found, model.schedule, now, fired=fire, not_before=not_before)
            started = trigger is not None and self.updates.start(name, trigger) is not None
            if fire:
                self._hold({name: ""}, name)  # it was made use of, or nothing waits that it could start
            if started:
                self.updates.advance()

    def _hold(self, fired: Mapping[str, str], model: str) -> None:
        """A fire that comes during a run, a pause or outside the windows waits for the end, also through a restart."""
        if fired.get(model, self._held(model) or "") != (self._held(model) or ""):
            with transaction(self.house.database) as connection:
                set_setting(connection, f"held_fire/{model}", fired[model])

    def _held(self, model: str) -> str | None:
        return setting(self.house.database, f"held_fire/{model}") or None

    def _fired(self, now: float) -> dict[str, str]:
        """Which models cron or an interval has fired for; the fire is kept before anything is made of it."""
        fires = self.clock.drain()
        if fires:
            with transaction(self.house.database) as connection:
                for fire in fires:
                    set_setting(connection, f"last_fire/{fire.model}/{fire.trigger}", repr(now))
        return {fire.model: fire.trigger for fire in fires}

    def is_paused(self, model: str) -> bool:
        """Whether an operator holds updates back, of this model or of all."""
        return any(setting(self.house.database, f"paused/{name}") == "1" for name in ("", model))

    def disk_is_low(self) -> bool:
        """Less free space than `disk_free_bytes_min` where the state lies."""
        return self.house.disk_is_low()

    def _sweep(self, command: Command) -> Said:
        removals = self.keeping.plan()
        if command.order.dry_run:
            lines = [f"{removal.path} ({removal.why})" for removal in removals]
            return "\n".join(lines) or "nothing would be removed", {"paths": [str(each.path) for each in removals]}
        freed = self.keeping.carry_out(removals)
        return f"{len(removals)} things removed, {freed / 2**20:.1f} MiB freed", {"removed": len(removals)}

    def reload(self) -> Said:
        """Take a new configuration: checked first, all or nothing. Runs at work keep the one that they began with."""
        sd_notify.notify_reloading()
        try:
            config = configuration.load(self.config_path)
            fixed = ("state_directory", "library_directory")
            if moved := [name for name in fixed if getattr(config, name) != getattr(self.house.config, name)]:
                raise ConfigError(f"{self.config_path}: {' and '.join(moved)} cannot change while the daemon runs")
        except ConfigError as error:
            self.reloads["reload_failures"] += 1
            log.error("the configuration stays as it was: %s", error)
            raise
        finally:
            sd_notify.notify(READY=1)
        self.house.config = config
        self.serving.configure()
        self.intake.watch()
        self.clock.declare(config.models, self._last_fires())
        self.reloads["reloads"] += 1
        log.info("configuration taken from %s", self.config_path)
        return f"configuration taken from {self.config_path}", {}

    def snapshot(self) -> dict[str, Any]:
        """What only the running daemon knows; called from other threads, so it touches no database."""
        return {
            "pid": os.getpid(),
            "started_at": self.started_at,
            "config_path": str(self.config_path),
            "engines": self.serving.notes(),
            "degraded": self.patience.trouble or self.intake.degraded,
            "counters": self.intake.counters() | self.reloads | self.patience.counters(),
        }

    def _last_fires(self) -> dict[str, float]:
        names = [f"{model}/{kind}" for model in self.house.config.models for kind in ("cron", "interval")]
        found = {name: setting(self.house.database, f"last_fire/{name}") for name in names}
        return {name: float(value) for name, value in found.items() if value}

    def close(self) -> None:
        """Stop in order: no new work, running trainers checkpoint, the database last."""
        self.intake.close()
        self.clock.close()
        self.telling.close()
        self.searches.stop()
        self.updates.stop()
        self.serving.close()
        self.house.close()
