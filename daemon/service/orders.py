"""Carries out what operators ask for through the control socket, one order at a time, in the daemon's own loop."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from buffers import claims
from daemon.config import ConfigError
from daemon.control import Action, Command
from daemon.engines.contract import EngineRefused, EngineUnavailable
from daemon.publish import DamagedVersion
from daemon.service.house import House, log
from daemon.service.rollouts import Rollouts
from daemon.service.serving import NoSuchVersion, Serving, name_of
from daemon.service.updates import Updates
from daemon.state import audit, runs
from daemon.state.database import set_setting, transaction
from daemon.state.rollouts import Contested, Trial
from daemon.state.runs import IllegalMove

REFUSALS = (IllegalMove, Contested, ConfigError, NoSuchVersion, DamagedVersion, EngineUnavailable, EngineRefused)
Said = tuple[str, Mapping[str, Any]]


class CannotBeDone(Exception):
    """An order that makes no sense now; the message tells the operator why and what to do."""


class Orders:
    """What each action does. `scan`, `reload`, `retry` and `drop` are the loop's and the intake's own."""

    def __init__(self, house: House, updates: Updates, serving: Serving, rollouts: Rollouts) -> None:
        self._house, self._updates, self._serving, self._rollouts = house, updates, serving, rollouts
        self.actions: dict[Action, Callable[[Command], Said]] = {
            "update": self._update,
            "pause": lambda command: self._pause(command, paused=True),
            "resume": lambda command: self._pause(command, paused=False),
            "rollback": self._rollback,
            "canary": self._canary,
            "promote": self._promote,
            "cancel": self._cancel,
            "requeue": self._requeue,
        }

    def carry_out(self, command: Command) -> None:
        """Do it and answer; whatever goes wrong is the answer, and the daemon goes on."""
        started = time.monotonic()
        try:
            text, detail = self.actions[command.order.action](command)
            command.answer(text, **detail)
        except (CannotBeDone, *REFUSALS) as error:
            command.answer(str(error), ok=False)
        except Exception as error:
            log.exception("the order %s broke", command.order.action)
            command.answer(f"{type(error).__name__}: {error}", ok=False)
        log.info("%s by %s (%.2f s)", command.order.action, command.actor, time.monotonic() - started)

    def _update(self, command: Command) -> Said:
        model = self._model(command)
        busy = [run.id for run in runs.active(self._house.database) if run.model == model]
        if busy:
            raise CannotBeDone(f"run {busy[0]} of {model} is still at work; see: eternad show {busy[0]}")
        run = self._updates.start(model, "manual")
        if run is None:
            raise CannotBeDone(f"nothing waits for {model}: drop files into content/{model}/ first")
        return f"run {run.id} started", {"run": run.id}

    def _pause(self, command: Command, *, paused: bool) -> Said:
        model = self._model(command) if command.order.model else ""
        with transaction(self._house.database) as connection:
            set_setting(connection, f"paused/{model}", "1" if paused else "0")
            audit.write(connection, command.order.action, model or "all models", actor=command.actor)
        return f"{model or 'all models'}: updates are {'held back' if paused else 'made again'}", {}

    def _rollback(self, command: Command) -> Said:
        model, trial = self._model(command), self._trial(command)
        if trial is not None:
            self._updates.withdraw(trial, f"by {command.actor}", command.actor)
            if command.order.version in (None, trial.stable or 0):
                text = f"{name_of(model, trial.version)} is no longer on trial; {model} stays with"
                return f"{text} {name_of(model, trial.stable)}", {"version": trial.stable}
        number = self._serving.rollback(model, command.order.version, command.actor)
        return f"{model} is served with {name_of(model, number)}", {"version": number}

    def _canary(self, command: Command) -> Said:
        """A share for a version: another one for what is on trial, or the begin of a trial by hand."""
        model, trial, percent = self._model(command), self._trial(command), command.order.percent
        if percent is None or not 0 < percent < 100:
            raise CannotBeDone("give a share of the requests: --percent 10 (more than 0, less than 100)")
        if trial is not None:
            self._check_same(trial, command.order.version)
            self._rollouts.hold(trial, percent, command.actor)
            number = trial.version
        else:
            number = self._untried(model, command.order.version)
            self._rollouts.begin_by_hand(model, number, percent, command.actor)
        text = f"{name_of(model, number)} answers {percent:g} % of the requests until it is promoted or rolled back"
        return text, {"version": number, "percent": percent}

    def _promote(self, command: Command) -> Said:
        model, trial = self._model(command), self._trial(command)
        if trial is None:
            raise CannotBeDone(f"nothing of {model} is on trial; to serve another version: eternad rollback {model} N")
        self._check_same(trial, command.order.version)
        self._updates.promote(trial, command.actor)
        return f"{model} is served with {name_of(model, trial.version)}", {"version": trial.version}

    def _trial(self, command: Command) -> Trial | None:
        return self._rollouts.current(self._model(command))

    def _check_same(self, trial: Trial, wanted: int | None) -> None:
        """What an operator has seen must still be the case: another one may have been faster."""
        if wanted not in (None, trial.version):
            raise CannotBeDone(
                f"version {trial.version} of {trial.model} is on trial, not {wanted}: nothing is changed"
            )

    def _untried(self, model: str, wanted: int | None) -> int:
        """The version to begin with: the newest that does not serve, unless one is named."""
        live = runs.live_version(self._house.database, model)
        if wanted is not None and live is not None and wanted == live.number:
            raise CannotBeDone(f"version {wanted} of {model} answers all requests already")
        found = [each.number for each in runs.versions(self._house.database, model) if each.state == "rolled_back"]
        if wanted is None and not found:
            raise CannotBeDone(f"{model} has no version to try; name one of: eternad versions {model}")
        number = wanted if wanted is not None else found[0]
        self._serving.check_servable(model, number)
        return number

    def _cancel(self, command: Command) -> Said:
        run = self._updates.cancel(self._run(command))
        return f"run {run.id} is cancelled; its examples wait again", {}

    def _requeue(self, command: Command) -> Said:
        identity = self._run(command)
        with transaction(self._house.database) as connection:
            waiting = claims.requeue(connection, identity)
            audit.write(connection, "requeue", identity, {"examples": waiting}, command.actor)
        return f"{waiting} examples of {identity} wait again", {"examples": waiting}

    def _model(self, command: Command) -> str:
        name = command.order.model or ""
        if name not in self._house.config.models:
            raise CannotBeDone(f"no model `{name}`; there are: {', '.join(self._house.config.models)}")
        return name

    def _run(self, command: Command) -> str:
        try:
            return runs.get(self._house.database, command.order.run_id or "").id
        except KeyError as error:
            raise CannotBeDone(f"no run {error}; see: eternad history") from None
