"""Keeps every engine on the version that is desired: activation after the gate, rollback, and reconciliation."""

import time
from pathlib import Path
from typing import Any

import msgspec

from daemon import publish
from daemon.engines import build
from daemon.engines.contract import Activation, Desired, Engine, EngineRefused, EngineUnavailable, activate, reconcile
from daemon.service.house import House, log
from daemon.state import runs
from daemon.state.database import transaction


class NoSuchVersion(Exception):
    """A rollback to a version that does not exist, was never accepted or is no longer on disk."""


class Serving:
    """The engines of the configuration and what each model is served with."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._engines: dict[str, Engine] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._next: dict[str, float] = {}
        self.configure()

    def configure(self) -> None:
        """Build the engines of the present configuration anew."""
        self.close()
        self._engines = {name: build(engine) for name, engine in self._house.config.engines.items()}
        self._next = {}

    def activate(self, model: str, number: int) -> Activation:
        """Verify a version's files, load it, prove it by a probe, and let the model's name point to it.

        Raises `EngineUnavailable` (try again), `EngineRefused` (never will) or `publish.DamagedVersion`.
        """
        desired = self._desired(model, number)
        activation = activate(self._engine(model), desired)
        self.note(model, f"serves {name_of(model, number)}", serving=number, state="ok")
        return activation

    def rollback(self, model: str, number: int | None, actor: str) -> int | None:
        """Serve another version (None: the one before the live one; 0: the base). Returns what is served then."""
        target = self._target(model, number)
        activation = None if target is None else self.activate(model, target)
        if target is None:
            self._engine(model).route(model, None)
        with transaction(self._house.database) as connection:
            detail = None if activation is None else msgspec.to_builtins(activation)
            runs.serve(connection, model, target, activation=detail, actor=actor)
        log.warning("%s is rolled back to %s by %s", model, name_of(model, target), actor)
        return target

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
        pending = {run.model for run in runs.active(self._house.database) if run.state == "PUBLISHED"}
        for name, model in self._house.config.models.items():
            if name in pending or now < self._next.get(name, 0.0):
                continue  # a version on its way in is activated by its run
            self._next[name] = now + self._house.config.engines[model.engine].reconcile_seconds
            self._reconcile_one(name)

    def _reconcile_one(self, model: str) -> None:
        live = runs.live_version(self._house.database, model)
        number = None if live is None else live.number
        try:
            desired = self._desired(model, number)
            if reconcile(self._engine(model), desired):
                log.warning("engine of %s had lost %s: it serves it again", model, name_of(model, number))
            self.note(model, f"serves {name_of(model, number)}", serving=number, state="ok")
        except EngineUnavailable as error:
            self.note(model, str(error), state="unavailable")
        except (EngineRefused, publish.DamagedVersion) as error:
            self.note(model, str(error), state="refused")

    def note(self, model: str, detail: str, *, serving: int | None = None, state: str = "unavailable") -> None:
        """What `status` shows of a model's engine; a change is logged once."""
        before = self._notes.get(model, {})
        if before.get("detail") != detail:
            (log.info if state == "ok" else log.warning)("engine of %s: %s", model, detail)
        self._notes[model] = {"state": state, "serving": serving, "detail": detail, "at": time.time()}

    def notes(self) -> dict[str, dict[str, Any]]:
        """The latest note of every model."""
        return dict(self._notes)

    def _desired(self, model: str, number: int | None) -> Desired:
        if number is None:
            return Desired(alias=model)
        directory = self.directory(model, number)
        manifest = publish.verify(directory)
        return Desired(alias=model, name=name_of(model, number), path=directory, canaries=manifest.canaries)

    def directory(self, model: str, number: int) -> Path:
        """`STATE/versions/MODEL/NNNN`."""
        return publish.directory_of(self._house.versions, model, number)

    def _engine(self, model: str) -> Engine:
        return self._engines[self._house.config.models[model].engine]

    def close(self) -> None:
        """Close the connections to the engines; they go on serving."""
        for engine in self._engines.values():
            engine.close()
        self._engines = {}


def name_of(model: str, number: int | None) -> str:
    """The name under which an engine knows a version: `npc@0003`; for the base: `base`."""
    return "base" if number is None else f"{model}@{number:04d}"
