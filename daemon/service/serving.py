"""Keeps every engine on the versions that are desired: activation after the gate, rollback, reconciliation."""

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec

from daemon import publish
from daemon.engines.activate import Activation, activate
from daemon.engines.build import build
from daemon.engines.contract import Engine, EngineRefused, EngineUnavailable, Version
from daemon.engines.exposure import Exposure, Split, expose
from daemon.engines.reconcile import Desired, Reconciled, reconcile
from daemon.log import about
from daemon.rollout import Stage
from daemon.service.house import House, log
from daemon.state import rollouts, runs
from daemon.state.database import transaction

ORDER_SECONDS, LISTING_SECONDS = 40.0, 5.0


class NoSuchVersion(Exception):
    """A rollback to a version that does not exist, was never accepted or is no longer on disk."""


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that had its share when its engine was last looked at."""

    split: Split
    stable: str
    """The name of the version that has the other requests."""
    traffic: dict[str, Any] | None = None
    """`GET /traffic` of the gateway."""
    turned_down: str = ""
    """Why the engine cannot serve it any more."""


class Serving:
    """The engines of the configuration and what each model is served with.

    Whatever an engine is asked happens in a thread, one request at a time for each engine: an engine that hangs must
    not keep files from being taken in. The database is only touched by the caller's thread.
    """

    def __init__(self, house: House) -> None:
        self._house = house
        self._engines: dict[str, Engine] = {}
        self._epochs: dict[str, str] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._next: dict[str, float] = {}
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="engine")
        self._activating: dict[tuple[str, int], Future[Activation]] = {}
        self._reconciling: dict[str, tuple[Future[Reconciled], list[Desired]]] = {}
        self._observed: dict[str, Observed] = {}
        self._abandoned: list[tuple[str, Future[Activation]]] = []
        self.configure()

    def configure(self) -> None:
        """Build the engines of the present configuration anew."""
        for engine in self._engines.values():
            engine.close()
        config = self._house.config
        gateway = config.gateway.admin_path(config.state_directory) if config.gateway.address else None
        owner = self._house.owner() if gateway is not None else None
        self._engines = {name: build(engine, gateway, owner) for name, engine in config.engines.items()}
        self._epochs, self._next = {}, {}

    def activate(self, model: str, number: int, stage: Stage | None = None) -> Activation | None:
        """Verify a version's files, load it, prove it by a probe, and let the model's name point to it.

        With a stage it only gets its share beside the live version. Begins it at the first call; None while it is at
        work. Raises `EngineUnavailable` (try again), `EngineRefused` (never will) or `publish.DamagedVersion`.
        """
        key, engine = (model, number), self._house.config.models[model].engine
        if key not in self._activating:
            self._apply_reconciled()  # else looks that last longer than their interval would never let one begin
            if self._is_busy(engine):
                return None
            self._activating[key] = self._threads.submit(self._activate, model, number, self._keep(engine), stage)
        if not self._activating[key].done():
            return None
        activation = self._activating.pop(key).result()
        if stage is None:
            self.note(model, f"serves {name_of(model, number)}", serving=number, state="ok")
        return activation

    def _activate(self, model: str, number: int, keep: set[str], stage: Stage | None = None) -> Activation:
        manifest, version = publish.verify(self.directory(model, number)), self._version(model, number)
        if stage is None:
            return activate(self._engine(model), model, version, manifest.canaries, keep=keep)
        return expose(self._engine(model), model, _exposure(version, manifest, stage), keep=keep)

    def activate_now(self, model: str, number: int, stage: Stage | None = None) -> dict[str, Any]:
        """The same for an operator, who waits; what `Activation` says."""
        engine = self._house.config.models[model].engine
        self._wait_for(engine)
        return dict(msgspec.to_builtins(self._activate(model, number, self._keep(engine), stage)))

    def _keep(self, engine: str) -> set[str]:
        """Names that must stay loaded: of every model the live version, the one before it, and what is on trial."""
        wishes = self._wishes(engine)
        wanted = [version for wish in wishes for version in (wish.version, wish.previous)]
        wanted += [wish.exposure.version for wish in wishes if wish.exposure is not None]
        return {version.name for version in wanted if version is not None}

    def kept(self, model: str) -> set[str]:
        """Names of versions whose files must stay, whatever an engine lists: what is on trial, and live beside it."""
        trial = rollouts.current(self._house.database, model)
        return set() if trial is None else {name_of(model, trial.version), name_of(model, trial.stable)}

    def observed(self, model: str) -> Observed | None:
        """How a candidate has done, once for each look at its engine."""
        return self._observed.pop(model, None)

    def hasten(self, model: str) -> None:
        """Look at the engine of a model at the next turn: something else is desired now."""
        self._observed.pop(model, None)
        if model in self._house.config.models:
            self._next.pop(self._house.config.models[model].engine, None)

    def abandon(self, model: str, number: int) -> None:
        """Nobody waits for this activation any more; what it has changed by its end is mended afterwards."""
        work = self._activating.pop((model, number), None)
        if work is not None:
            self._abandoned.append((self._house.config.models[model].engine, work))
        self.hasten(model)

    def _is_busy(self, engine: str) -> bool:
        """Whether a thread talks to this engine now."""
        activating = (self._house.config.models[model].engine for model, _ in self._activating)
        self._abandoned = [(name, work) for name, work in self._abandoned if not work.done()]
        return engine in self._reconciling or engine in activating or any(engine == name for name, _ in self._abandoned)

    def rollback(self, model: str, number: int | None, actor: str) -> int | None:
        """Serve another version (None: the one before the live one; 0: the base). Returns what is served then."""
        target = self._target(model, number)
        detail: dict[str, Any] | None = None
        if target is None:
            self._wait_for(self._house.config.models[model].engine)
            engine = self._engine(model)
            engine.route(model, engine.capabilities().base, engine.aliases().get(model))
        else:
            detail = self.activate_now(model, target)
        with transaction(self._house.database) as connection:
            runs.serve(connection, model, target, activation=detail, actor=actor)
        self.note(model, f"serves {name_of(model, target)}", serving=target, state="ok")
        log.warning("%s is rolled back to %s by %s", model, name_of(model, target), actor, extra=about(model=model))
        return target

    def listed(self, model: str) -> list[str]:
        """Names and directories that the engine of a model has loaded; raises `EngineUnavailable`, `EngineRefused`."""
        work = self._threads.submit(self._engine(model).loaded)
        try:
            return [word for row in work.result(LISTING_SECONDS) for word in (row.name, row.root)]
        except TimeoutError:
            raise EngineUnavailable(f"the engine of {model} did not list its adapters in time") from None

    def _wait_for(self, engine: str) -> None:
        """An operator's order comes after what a thread is doing with the engine, and is told when that takes long."""
        work: list[Future[Any]] = [future for future, _ in self._reconciling.values()]
        work += self._activating.values()
        if wait(work, timeout=ORDER_SECONDS).not_done:
            raise EngineUnavailable(f"engine {engine} does not answer; see: eternad status")
        self._apply_reconciled()

    def _target(self, model: str, number: int | None) -> int | None:
        live = runs.live_version(self._house.database, model)
        if number is None:
            if live is None:
                raise NoSuchVersion(f"{model} is served with its base model: there is nothing to roll back")
            return live.parent
        if number == 0:
            return None
        self.check_servable(model, number)
        return number

    def check_servable(self, model: str, number: int) -> None:
        """Raises `NoSuchVersion` for one that was never accepted, has failed, or is no longer on disk."""
        known = {version.number: version.state for version in runs.versions(self._house.database, model)}
        if known.get(number) not in ("live", "superseded", "rolled_back"):
            raise NoSuchVersion(f"{model} has no version {number} that could serve; see: eternad versions {model}")

    def reconcile(self, now: float) -> None:
        """Every few seconds: compare what each engine serves with what is desired, and mend it."""
        self._apply_reconciled()
        for name, engine in self._house.config.engines.items():
            # not put off by a clock that was set back
            is_due = not 0 < self._next.get(name, 0.0) - now <= engine.reconcile_seconds
            if is_due and not self._is_busy(name):
                self._next[name] = now + engine.reconcile_seconds
                wishes = self._wishes(name)
                work = self._threads.submit(reconcile, self._engines[name], wishes, self._epochs.get(name, ""))
                self._reconciling[name] = (work, wishes)

    def _apply_reconciled(self) -> None:
        for name, (work, wishes) in list(self._reconciling.items()):
            if not work.done():
                continue
            del self._reconciling[name]
            try:
                done = work.result()
            except (EngineUnavailable, EngineRefused) as error:
                for wish in wishes:
                    self.note(wish.alias, str(error))
                continue
            self._epochs[name] = done.epoch
            for wish in wishes:
                self._note_reconciled(wish, done)

    def close(self) -> None:
        """Let the threads end; the engines go on serving."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _note_reconciled(self, wish: Desired, done: Reconciled) -> None:
        if wish.exposure is not None and wish.alias not in done.errors:
            self._observed[wish.alias] = Observed(
                split=wish.exposure.split, stable=done.aliases.get(wish.alias, ""), traffic=done.traffic,
                turned_down=done.turned_down.get(wish.alias, ""),
            )  # fmt: skip
        if wish.alias in done.errors:
            self.note(wish.alias, done.errors[wish.alias], state="refused")
            return
        number = None if wish.version is None else wish.version.number
        if any(activation.alias == wish.alias and activation.previous != activation.version
               for activation in done.activations):  # fmt: skip
            log.warning("the engine had lost %s: it serves it again", name_of(wish.alias, number))
        self.note(wish.alias, f"serves {name_of(wish.alias, number)}", serving=number, state="ok")

    def note(self, model: str, detail: str, *, serving: int | None = None, state: str = "unavailable") -> None:
        """What `status` shows of a model's engine; a change is logged once."""
        before = self._notes.get(model, {})
        if before.get("detail") != detail:
            (log.info if state == "ok" else log.warning)("engine of %s: %s", model, detail, extra=about(model=model))
        self._notes[model] = {"state": state, "serving": serving, "detail": detail, "at": time.time()}

    def notes(self) -> dict[str, dict[str, Any]]:
        """The latest note of every model."""
        return dict(self._notes)

    def _wishes(self, engine: str) -> list[Desired]:
        """What each model of an engine should be served with, but for those whose new version is on its way in."""
        arriving = {run.model for run in runs.active(self._house.database) if run.state == "PUBLISHED"}
        wishes = [self._desired(name) for name, model in self._house.config.models.items() if model.engine == engine]
        return [wish for wish in wishes if wish.alias not in arriving or wish.exposure is not None]

    def _desired(self, model: str) -> Desired:
        live = runs.live_version(self._house.database, model)
        if live is None:
            return Desired(alias=model, version=None, exposure=self._exposed(model))
        manifest = publish.read_manifest(self.directory(model, live.number))
        previous = live.parent
        if previous is not None and not self.directory(model, previous).exists():
            previous = None
        return Desired(
            alias=model,
            version=self._version(model, live.number),
            canaries=manifest.canaries if manifest is not None else [],
            previous=None if previous is None else self._version(model, previous),
            exposure=self._exposed(model),
        )

    def _exposed(self, model: str) -> Exposure | None:
        """What is on trial."""
        trial = rollouts.current(self._house.database, model)
        manifest = publish.read_manifest(self.directory(model, trial.version)) if trial is not None else None
        if trial is None or manifest is None:
            return None
        return _exposure(self._version(model, trial.version), manifest, Stage(trial.kind, trial.percent))

    def _version(self, model: str, number: int) -> Version:
        return Version(model=model, number=number, path=self.directory(model, number))

    def directory(self, model: str, number: int) -> Path:
        """`STATE/versions/MODEL/NNNN`."""
        return publish.directory_of(self._house.versions, model, number)

    def _engine(self, model: str) -> Engine:
        return self._engines[self._house.config.models[model].engine]


def _exposure(version: Version, manifest: publish.Manifest, stage: Stage) -> Exposure:
    return Exposure(
        version=version, canaries=manifest.canaries, share=share_of(stage), is_shadow=stage.kind == "shadow"
    )  # fmt: skip


def share_of(stage: Stage) -> float:
    """Of the requests, as it stands in the gateway's table."""
    return round(stage.percent / 100, 6)


def name_of(model: str, number: int | None) -> str:
    """The name under which an engine knows a version: `npc@0003`; for the base: `base`."""
    return "base" if number is None else f"{model}@{number:04d}"
