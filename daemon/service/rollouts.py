"""Versions on trial: what live requests say about them, and the steps from the first share to all requests or back."""

import math
import time

import msgspec

from daemon.engines.exposure import Split
from daemon.rollout import Judgement, Signals, Stage, add, judge, stages
from daemon.service.house import House, log
from daemon.service.serving import Observed, Serving, name_of, share_of
from daemon.state import records, rollouts, runs
from daemon.state.database import transaction
from daemon.state.rollouts import Trial
from daemon.state.runs import Run


class Rollouts:
    """At most one trial per model. What it decides about runs is carried out by `Updates`."""

    def __init__(self, house: House, serving: Serving) -> None:
        self._house, self._serving = house, serving

    def first_stage(self, model: str) -> Stage | None:
        """What a new version of a model begins with; None: all requests at once."""
        return next(iter(stages(self._house.model(model).rollout)), None)

    def current(self, model: str) -> Trial | None:
        """The trial that is at work."""
        return rollouts.current(self._house.database, model)

    def begin(self, run: Run, stage: Stage) -> Run:
        """The engine has given a new version its first share: the run is CANARY from now on."""
        assert run.version is not None  # published
        with transaction(self._house.database) as connection:
            live = runs.live_version(connection, run.model)
            rollouts.begin(
                connection, run.model, run.version, None if live is None else live.number,
                self._house.model(run.model).rollout, stage, is_first=True,
            )  # fmt: skip
            runs.set_version_state(connection, run.model, run.version, "canary")
            moved = runs.move(connection, run, "CANARY", run.reason)
        self._serving.hasten(run.model)
        log.info("%s is on trial: %s %g %%", name_of(run.model, run.version), stage.kind, stage.percent)
        return moved

    def begin_by_hand(self, model: str, number: int, percent: float, actor: str) -> None:
        """Give a version that has served before a share, until an operator ends it."""
        stage = Stage("canary", percent)
        live = runs.live_version(self._house.database, model)
        self._serving.activate_now(model, number, stage)
        with transaction(self._house.database) as connection:
            rollouts.begin(
                connection, model, number, None if live is None else live.number, self._house.model(model).rollout,
                stage, is_first=False, is_held=True, actor=actor,
            )  # fmt: skip
        self._serving.hasten(model)

    def hold(self, trial: Trial, percent: float, actor: str) -> None:
        """An operator's share in the place of the plan's: it stays until an operator promotes or rolls back."""
        with transaction(self._house.database) as connection:
            rollouts.step(connection, trial, trial.stage, Stage("canary", percent), is_held=True, actor=actor)
        self._serving.hasten(trial.model)

    def look(self, trial: Trial) -> Judgement | None:
        """Count and judge; a stage that has passed is followed by the next. What is left to do: `pass` or `fail`."""
        is_last = trial.stage + 1 >= len(trial.plan)
        if trial.judgement is not None and trial.judgement.outcome == "pass" and is_last and not trial.is_held:
            return trial.judgement  # on its way to all requests; the engine may need several turns
        seen = self._serving.observed(trial.model)
        if seen is None or seen.split != self._split(trial):
            return None
        signals, judgement = self._judge(trial, seen)
        with transaction(self._house.database) as connection:
            rollouts.note(connection, trial, signals, judgement)
        if judgement.outcome == "pass" and not trial.is_held and not is_last:
            self._next(trial)
            return None
        return judgement if judgement.outcome == "fail" or (judgement.outcome == "pass" and not trial.is_held) else None

    def _next(self, trial: Trial) -> None:
        following = trial.plan[trial.stage + 1]
        with transaction(self._house.database) as connection:
            rollouts.step(connection, trial, trial.stage + 1, following)
        self._serving.hasten(trial.model)
        log.info("%s: %s %g %%", name_of(trial.model, trial.version), following.kind, following.percent)

    def _judge(self, trial: Trial, seen: Observed) -> tuple[Signals, Judgement]:
        if seen.turned_down or seen.traffic is None:
            return trial.signals, Judgement(outcome="fail", reason=f"fingerprint: {seen.turned_down}")
        candidate = name_of(trial.model, trial.version)
        signals = self._with_feedback(trial, add(trial.signals, seen.traffic, candidate, seen.stable, trial.kind))
        settings = trial.settings
        if trial.is_held:
            settings = msgspec.structs.replace(settings, wait_seconds_max=math.inf)
        return signals, judge(settings, trial.kind, signals, max(0.0, time.time() - trial.stage_began_at))

    def _with_feedback(self, trial: Trial, signals: Signals) -> Signals:
        """What players have said about either version's answers since the stage began."""
        replace, sides = msgspec.structs.replace, {}
        for side, number in (("candidate", trial.version), ("stable", trial.stable or 0)):
            said, bad = records.complaints(self._house.database, trial.model, number, trial.record_from)
            sides[side] = replace(getattr(signals, side), feedback=said, complaints=bad)
        return replace(signals, **sides)

    @staticmethod
    def _split(trial: Trial) -> Split:
        stage = Stage(trial.kind, trial.percent)
        name = name_of(trial.model, trial.version)
        return Split(candidate=name, share=share_of(stage), is_shadow=trial.kind == "shadow")
