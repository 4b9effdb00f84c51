"""Moves runs through their states: one small function per state, each ending in one transaction.

    PENDING -> TRAINING -> TRAINED -> EVALUATING -> ACCEPTED -> PUBLISHED [-> CANARY] -> LIVE

Whatever dies at whatever line: the next call of `advance` does the step again from files plus the state column.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from buffers import claims, experience, journal
from daemon import failpoint, gate, publish, review, update
from daemon.engines.contract import EngineRefused, EngineUnavailable
from daemon.log import about
from daemon.rollout import Stage
from daemon.service.house import House, log
from daemon.service.rollouts import Rollouts
from daemon.service.serving import Serving, name_of
from daemon.standby import Standbys
from daemon.state import rollouts, runs
from daemon.state.database import transaction
from daemon.state.rollouts import Trial
from daemon.state.runs import Run, RunState
from daemon.state.trouble import trouble_of
from daemon.state.waiting import share_of
from strategies.request import read_report, read_request

# what is wrong with the machine is not held against the examples
ENVIRONMENT_CODES = {"base_missing", "oom", "disk_full", "teacher", "died", "hang", "interrupted"}
STOP_SECONDS = 60.0
HUNG_STOP_SECONDS = 15.0
"""For one that hangs: the loop stands still meanwhile, and must not for as long as the unit's watchdog waits (60 s)."""


def about_run(run: Run, code: str | None = None) -> dict[str, object]:
    """For the fields of a log entry."""
    return about(model=run.model, run=run.id, version=run.version, code=code)


class Updates:
    """The runs of all models, at most one of them in training."""

    def __init__(self, house: House, serving: Serving, rollouts: Rollouts) -> None:
        self._house, self._serving, self._rollouts = house, serving, rollouts
        self._trainers: dict[str, update.Trainer] = {}
        self._standbys = Standbys()
        self._trained: set[str] = set()
        """Models whose trainer has ended and whose run has not: afterwards a standby is prepared."""
        self._steps: dict[RunState, Callable[[Run], Run | None]] = {
            "PENDING": self._begin,
            "TRAINING": self._watch,
            "TRAINED": lambda run: self._move(run, "EVALUATING"),
            "EVALUATING": self._judge,
            "ACCEPTED": self._publish,
            "PUBLISHED": self._introduce,
            "CANARY": self._try,
        }

    def advance(self) -> None:
        """Take every active run as far as it goes now."""
        for run in runs.active(self._house.database):
            following: Run | None = run
            while following is not None and following.state in self._steps:
                following = self._step(following)
        self._watch_trials_by_hand()
        self._stand_by()

    def _stand_by(self) -> None:
        """Prepare the next trainer once a run is over: it shall not take a core from the swap."""
        models, busy = self._house.config.models, {run.model for run in runs.active(self._house.database)}
        for name in self._trained - busy:
            self._trained.discard(name)
            if name in models:
                self._standbys.prepare(name, models[name])
        self._standbys.look_after(models)

    def _step(self, run: Run) -> Run | None:
        """One of the daemon's two catch-all boundaries: a run that breaks ends with a reason, the daemon goes on."""
        try:
            return self._steps[run.state](run)
        except Exception as error:
            if trouble_of(error):
                raise  # nothing is wrong with the run: the step is done again when the disk takes it
            log.exception("run %s broke in state %s", run.id, run.state, extra=about_run(run))
            return self._fail(run, "internal", f"{type(error).__name__}: {error} (in state {run.state})")

    def start(self, model: str, trigger: str) -> Run | None:
        """A PENDING run on what waits for `model`; None when nothing does."""
        live = runs.live_version(self._house.database, model)
        limit = self._house.model(model).schedule.examples_max
        failpoint.reach("PENDING:before")
        with transaction(self._house.database) as connection:
            held = review.hold_associations(connection, self._house.config.trust, model)
            parent, share = None if live is None else live.number, share_of(self._house.config.trust)
            run = runs.create(connection, model, trigger, parent, limit, share)
        failpoint.reach("PENDING:after")
        if held:
            log.warning("%d records of %s look like a backdoor and wait for review: eternad review ls", held, model)
        if run is not None:
            log.info("run %s begins (%s)", run.id, trigger, extra=about_run(run))
        return run

    def cancel(self, run_id: str) -> Run:
        """End a run that an operator does not want; its examples wait again, without a mark against them."""
        run = runs.get(self._house.database, run_id)
        self._trainer(run).kill()
        return self._end(run, "CANCELLED", "cancelled by the operator", held_against=False)

    def stop(self) -> None:
        """The daemon ends: running trainers write a checkpoint and are taken up again at the next start."""
        for run in runs.active(self._house.database):
            if run.state == "TRAINING":
                self._trainer(run).stop(STOP_SECONDS)
                self._watch(run)
        self._standbys.close()

    def directory(self, run: Run) -> Path:
        """`STATE/runs/RUN_ID/`."""
        return self._house.runs / run.id

    # -- one function per state -----------------------------------------------------------------------------------

    def _begin(self, run: Run) -> Run | None:
        if any(other.state == "TRAINING" for other in runs.active(self._house.database)):
            return None  # one user of the GPU at a time
        if self._house.disk_is_low():
            return None  # a trainer would only fail to save
        directory, model = self.directory(run), self._house.model(run.model)
        directory.mkdir(exist_ok=True)
        if not (directory / "request.json").exists():
            rebase = self._is_rebase(run)
            cut = experience.cut(
                self._house.database, run.model, run.id, run.update_number, update.recipe_of(model, rebase=rebase),
                directory / "experience.jsonl",
            )  # fmt: skip
            with transaction(self._house.database) as connection:
                runs.annotate(connection, run, cut)
            self._trainer(run).prepare(
                update.request_of(
                    model, run_id=run.id, name=run.model, update_number=run.update_number,
                    parent=self._version_directory(run.model, run.parent_version),
                    experience_sha256=cut.sha256, cache=self._house.cache, rebase=rebase,
                )
            )  # fmt: skip
        if not self._start(run.model, self._trainer(run)):
            return None
        return self._move(run, "TRAINING", pid=self._trainer(run).pid)

    def _start(self, name: str, trainer: update.Trainer) -> bool:
        """Whether the child could be started: `gpu_lock_file` may be held by another program, which is waited for."""
        path, model = self._house.config.gpu_lock_file, self._house.model(name)
        if path is None:
            trainer.start(standby=self._standbys.take(name, model))
            return True
        if (lock := update.take_lock(path)) is None:
            return False
        try:
            trainer.start(lock, standby=self._standbys.take(name, model))
        finally:
            os.close(lock)  # the child holds it from here on
        return True

    def _is_rebase(self, run: Run) -> bool:
        """A rebase that the gate has refused is not tried again: its examples are learned in an ordinary update."""
        refused = any(
            other.state == "REJECTED" and other.update_number == run.update_number
            for other in runs.recent(self._house.database, run.model)
        )
        return update.is_rebase(self._house.model(run.model), run.update_number) and not refused

    def _watch(self, run: Run) -> Run | None:
        trainer = self._trainer(run)
        finished = trainer.finished()
        if finished is None:
            if trainer.hangs(self._house.config.hang_seconds):
                trainer.stop(HUNG_STOP_SECONDS)
                return self._again(run, "hang", "the trainer made no progress and was ended")
            return None
        self._trainers.pop(run.id, None)
        self._trained.add(run.model)
        if finished.outcome == "trained":
            return self._move(run, "TRAINED", pid=None)
        if finished.outcome == "interrupted":
            self._move(run, "PENDING", "interrupted; goes on from its checkpoint", pid=None)
            return None  # not begun again at once: it was told to stop
        if finished.outcome == "died":
            return self._again(run, finished.code, finished.reason)
        return self._fail(run, finished.code, finished.reason)

    def _again(self, run: Run, code: str, reason: str) -> Run | None:
        """Another attempt from the last checkpoint, or one that needs less memory, until they are used up."""
        self._trainers.pop(run.id, None)
        if run.attempts + 1 >= self._house.config.run_attempts_max:
            return self._fail(run, code, f"{reason} (attempt {run.attempts + 1})")
        if code == "oom":
            update.use_less_memory(self.directory(run))
        log.warning("run %s: %s; trying again", run.id, reason, extra=about_run(run))
        return self._move(run, "PENDING", reason, pid=None, attempts=run.attempts + 1)

    def _judge(self, run: Run) -> Run | None:
        report = read_report(self.directory(run))
        if report is None:
            return self._fail(run, "died", f"{self.directory(run)}/report.json is gone")
        verdict = gate.judge(report, self._house.model(run.model).gate)
        log.info("run %s is %s: %s", run.id, verdict.outcome, verdict.reason, extra=about_run(run))
        if verdict.outcome == "accepted":
            return self._move(run, "ACCEPTED", verdict.reason, verdict=verdict)
        return self._end(run, "REJECTED", verdict.reason, held_against=verdict.outcome == "rejected", verdict=verdict)

    def _publish(self, run: Run) -> Run | None:
        directory, number = self.directory(run), runs.next_version(self._house.database, run.model)
        report, request = read_report(directory), read_request(directory)
        assert report is not None  # a run is ACCEPTED by its report
        manifest = publish.manifest_of(
            report, model=run.model, number=number, parent=run.parent_version, run_id=run.id,
            update_number=run.update_number, experience_sha256=request.experience_sha256,
        )  # fmt: skip
        failpoint.reach("PUBLISHED:files")
        digest = publish.publish(directory, publish.directory_of(self._house.versions, run.model, number), manifest)
        failpoint.reach("PUBLISHED:before")
        with transaction(self._house.database) as connection:
            runs.publish(connection, run, number, digest)
            moved = runs.move(connection, run, "PUBLISHED", run.reason, version=number)
        failpoint.reach("PUBLISHED:after")
        return moved

    def _introduce(self, run: Run) -> Run | None:
        if self._rollouts.current(run.model) is not None:
            return None  # another version is on trial by hand: one at a time
        return self._activate(run, self._rollouts.first_stage(run.model))

    def _try(self, run: Run) -> Run | None:
        trial = self._rollouts.current(run.model)
        assert trial is not None  # begun in the transaction that made the run CANARY, ended in the one that moves it
        judgement = self._rollouts.look(trial)
        if judgement is None:
            return None
        return self._activate(run) if judgement.outcome == "pass" else self._turn_down(run, judgement.reason)

    def _activate(self, run: Run, stage: Stage | None = None) -> Run | None:
        assert run.version is not None  # set in the transaction that made it PUBLISHED
        try:
            activation = self._serving.activate(run.model, run.version, stage)
        except EngineUnavailable as error:
            self._serving.note(run.model, str(error))
            return None  # the version stays desired; the next turn tries again
        except (EngineRefused, publish.DamagedVersion) as error:
            return self._fail(run, "refused", str(error))  # the version before goes on serving
        if activation is None:
            return None
        if stage is None:
            return self._go_live(run, msgspec.to_builtins(activation))
        failpoint.reach("CANARY:before")
        moved = self._rollouts.begin(run, stage)
        failpoint.reach("CANARY:after")
        return moved

    def _go_live(self, run: Run, activation: dict[str, Any], actor: str = "eternad") -> Run:
        report = read_report(self.directory(run))
        failpoint.reach("LIVE:before")
        with transaction(self._house.database) as connection:
            claims.consume(connection, run.id, run.update_number)
            journal.remember_tokens(connection, report.example_tokens if report is not None else [])
            journal.remember_losses(connection, report.example_losses if report is not None else [])
            rollouts.end_of(connection, run.model, run.version, "promoted", run.reason, actor)
            moved = runs.move(connection, run, "LIVE", run.reason)
            runs.serve(connection, run.model, run.version, activation=activation, actor=actor)
        failpoint.reach("LIVE:after")
        log.info("%s is live (%s)", name_of(run.model, run.version), run.reason, extra=about_run(run))
        self._drop_bulk(run)
        return moved

    # -- trials ---------------------------------------------------------------------------------------------------

    def _watch_trials_by_hand(self) -> None:
        """Those of versions that have served before: their runs are at their end."""
        for model in self._house.config.models:
            trial = self._rollouts.current(model)
            if trial is not None and not trial.is_first:
                judgement = self._rollouts.look(trial)
                if judgement is not None and judgement.outcome == "fail":
                    self.withdraw(trial, judgement.reason)

    def promote(self, trial: Trial, actor: str) -> None:
        """An operator wants the version on trial to answer all requests now. Raises as an activation does."""
        detail = self._serving.activate_now(trial.model, trial.version)
        if trial.is_first:
            self._go_live(rollouts.run_of(self._house.database, trial), detail, actor)
            return
        with transaction(self._house.database) as connection:
            rollouts.end(connection, trial, "promoted", f"by {actor}", actor)
            runs.serve(connection, trial.model, trial.version, activation=detail, actor=actor)

    def withdraw(self, trial: Trial, reason: str, actor: str = "eternad") -> None:
        """The version on trial loses its share; the engine follows at the next turn."""
        if trial.is_first:
            self._turn_down(rollouts.run_of(self._house.database, trial), reason, actor)
            return
        log.warning("%s is rolled back: %s", name_of(trial.model, trial.version), reason)
        with transaction(self._house.database) as connection:
            rollouts.end(connection, trial, "rolled_back", reason, actor)
        self._serving.hasten(trial.model)

    def _turn_down(self, run: Run, reason: str, actor: str = "eternad") -> Run:
        log.warning("%s is rolled back: %s", name_of(run.model, run.version), reason, extra=about_run(run))
        return self._end(run, "ROLLED_BACK", reason, held_against=True, actor=actor)

    # -- helpers of all states ------------------------------------------------------------------------------------

    def _move(self, run: Run, to: RunState, reason: str = "", **columns: Any) -> Run:
        failpoint.reach(f"{to}:before")
        with transaction(self._house.database) as connection:
            moved = runs.move(connection, run, to, reason, **columns)
        failpoint.reach(f"{to}:after")
        return moved

    def _fail(self, run: Run, code: str, reason: str) -> Run:
        log.error("run %s failed (%s): %s", run.id, code, reason, extra=about_run(run, code))
        return self._end(run, "FAILED", f"{code}: {reason}", held_against=code not in ENVIRONMENT_CODES)

    def _end(
        self, run: Run, to: RunState, reason: str, *, held_against: bool, actor: str = "eternad", **columns: Any
    ) -> Run:
        self._trainers.pop(run.id, None)
        failpoint.reach(f"{to}:before")
        with transaction(self._house.database) as connection:
            ending: rollouts.Ending = "cancelled" if to == "CANCELLED" else "rolled_back"
            rollouts.end_of(connection, run.model, run.version, ending, reason, actor)
            moved = runs.move(connection, run, to, reason, **columns)
            if run.version is not None:
                state = "rolled_back" if to == "ROLLED_BACK" else "failed"
                runs.set_version_state(connection, run.model, run.version, state)
            attempts_max = self._house.config.run_attempts_max
            rejected = claims.release(connection, run.id, attempts_max=attempts_max, failed=held_against)
        failpoint.reach(f"{to}:after")
        if run.version is not None:
            self._serving.abandon(run.model, run.version)
        if rejected:
            log.warning("%d examples of run %s are set aside: they failed %d times", rejected, run.id, attempts_max)
        return moved

    def _trainer(self, run: Run) -> update.Trainer:
        return self._trainers.setdefault(run.id, update.Trainer(self.directory(run)))

    def _version_directory(self, model: str, number: int | None) -> Path | None:
        return None if number is None else publish.directory_of(self._house.versions, model, number)

    def _drop_bulk(self, run: Run) -> None:
        """A published run's weights live on in its version: report, request and log are all that is kept of the run."""
        for name in ("adapter", "strategy", "checkpoint"):
            shutil.rmtree(self.directory(run) / name, ignore_errors=True)
