"""Keeps every engine on the versions that are desired: activation after the gate, rollback, reconciliation."""

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec

from daemon import publish
from daemon.engines.activate import Activation, Desired, Reconciled, activate, reconcile
from daemon.engines.build import build
from daemon.engines.contract import Engine, EngineRefused, EngineUnavailable, Version
from daemon.service.house import House, log
from daemon.state import runs
from daemon.state.database import transaction

ORDER_SECONDS, LISTING_SECONDS = 40.0, 5.0


class NoSuchVersion(Exception):
    """A rollback to a version that does not exist, was never accepted or is no longer on disk."""


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
        self.configure()

    def configure(self) -> None:
        """Build the engines of the present configuration anew."""
        for engine in self._engines.values():
            engine.close()
        config = self._house.config
        gateway = config.gateway.admin_path(config.state_directory) if config.gateway.address else None
        self._engines = {name: build(engine, gateway) for name, engine in config.engines.items()}
        self._epochs, self._next = {}, {}

    def activate(self, model: str, number: int) -> Activation | None:
        """Verify a version's files, load it, prove it by a probe, and let the model's name point to it.

        Begins it at the first call; None while it is at work. Raises `EngineUnavailable` (try again), `EngineRefused`
        (never will) or `publish.DamagedVersion`.
        """
        key, engine = (model, number), self._house.config.models[model].engine
        if key not in self._activating:
            if self._is_busy(engine):
                return None
            self._activating[key] = self._threads.submit(self._activate, model, number, self._keep(engine))
        if not self._activating[key].done():
            return None
        activation = self._activating.pop(key).result()
        self.note(model, f"serves {name_of(model, number)}", serving=number, state="ok")
        return activation

    def _activate(self, model: str, number: int, keep: set[str]) -> Activation:
        manifest = publish.verify(self.directory(model, number))
        return activate(self._engine(model), model, self._version(model, number), manifest.canaries, keep=keep)

    def _keep(self, engine: str) -> set[str]:
        """Names that must stay loaded: of every model the live version and the one before it."""
        wishes = self._wishes(engine)
        wanted = [version for wish in wishes for version in (wish.version, wish.previous)]
        return {version.name for version in wanted if version is not None}

    def _is_busy(self, engine: str) -> bool:
        """Whether a thread talks to this engine now."""
        activating = (self._house.config.models[model].engine for model, _ in self._activating)
        return engine in self._reconciling or engine in activating

    def rollback(self, model: str, number: int | None, actor: str) -> int | None:
        """Serve another version (None: the one before the live one; 0: the base). Returns what is served then."""
        target = self._target(model, number)
        self._wait_for(self._house.config.models[model].engine)
        detail: dict[str, Any] | None = None
        if target is None:
            engine = self._engine(model)
            engine.route(model, engine.capabilities().base, engine.aliases().get(model))
        else:
            keep = self._keep(self._house.config.models[model].engine)
            detail = msgspec.to_builtins(self._activate(model, target, keep))
        with transaction(self._house.database) as connection:
            runs.serve(connection, model, target, activation=detail, actor=actor)
        self.note(model, f"serves {name_of(model, target)}", serving=target, state="ok")
        log.warning("%s is rolled back to %s by %s", model, name_of(model, target), actor)
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
        known = {version.number: version.state for version in runs.versions(self._house.database, model)}
        if known.get(number) not in ("live", "superseded", "rolled_back"):
            raise NoSuchVersion(f"{model} has no version {number} that could serve; see: eternad versions {model}")
        return number

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
            (log.info if state == "ok" else log.warning)("engine of %s: %s", model, detail)
        self._notes[model] = {"state": state, "serving": serving, "detail": detail, "at": time.time()}

    def notes(self) -> dict[str, dict[str, Any]]:
        """The latest note of every model."""
        return dict(self._notes)

    def _wishes(self, engine: str) -> list[Desired]:
        """What each model of an engine should be served with, but for those whose new version is on its way in."""
        arriving = {run.model for run in runs.active(self._house.database) if run.state == "PUBLISHED"}
        models = [name for name, model in self._house.config.models.items() if model.engine == engine]
        return [self._desired(name) for name in models if name not in arriving]

    def _desired(self, model: str) -> Desired:
        live = runs.live_version(self._house.database, model)
        if live is None:
            return Desired(alias=model, version=None)
        manifest = publish.read_manifest(self.directory(model, live.number))
        previous = live.parent
        if previous is not None and not self.directory(model, previous).exists():
            previous = None
        return Desired(
            alias=model,
            version=self._version(model, live.number),
            canaries=manifest.canaries if manifest is not None else [],
            previous=None if previous is None else self._version(model, previous),
        )

    def _version(self, model: str, number: int) -> Version:
        return Version(model=model, number=number, path=self.directory(model, number))

    def directory(self, model: str, number: int) -> Path:
        """`STATE/versions/MODEL/NNNN`."""
        return publish.directory_of(self._house.versions, model, number)

    def _engine(self, model: str) -> Engine:
        return self._engines[self._house.config.models[model].engine]


def name_of(model: str, number: int | None) -> str:
    """The name under which an engine knows a version: `npc@0003`; for the base: `base`."""
    return "base" if number is None else f"{model}@{number:04d}"
