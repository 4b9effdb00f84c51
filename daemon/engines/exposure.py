"""A candidate beside the live version: a share of the requests, or a comparison in the background."""

import contextlib
import time
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

import msgspec

from daemon.engines.activate import Activation, check_not_lost, make_room, prove
from daemon.engines.contract import Engine, EngineRefused, EngineUnavailable, Routed, Version
from daemon.engines.proof import Match
from strategies.request import Canary


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """What an alias has beside its stable version."""

    candidate: str
    share: float
    """Of the requests that it answers, or of those that are compared: above 0, at most 1."""
    is_shadow: bool = False


class Exposure(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that should have a share."""

    version: Version
    canaries: list[Canary]
    share: float
    is_shadow: bool

    @property
    def split(self) -> Split:
        """How it stands in the table."""
        return Split(candidate=self.version.name, share=self.share, is_shadow=self.is_shadow)


@runtime_checkable
class Splitting(Engine, Protocol):
    """An engine behind something that can share an alias among versions: the gateway."""

    def splits(self) -> dict[str, Split]:
        """{alias: what shares it}, of those that are shared."""

    def split(self, alias: str, stable: str, split: Split | None, expected: str | None) -> Routed:
        """Share the alias, or end that; `expected` as in `route`. Raises `EngineUnavailable`."""

    def traffic(self) -> dict[str, Any]:
        """How the versions have done since its start: `GET /traffic` of the gateway."""


def splitting(engine: Engine) -> Splitting:
    """The same, if it can share aliases; else `EngineRefused`."""
    if not isinstance(engine, Splitting):
        raise EngineRefused("only the gateway splits requests: give [gateway] address in the configuration")
    return engine


def expose(engine: Engine, alias: str, exposure: Exposure, *, keep: Collection[str] = ()) -> Activation:
    """Load the candidate beside the live version, prove it, and give it its share. Raises as `activate` does.

    The live version goes on answering all other requests; a candidate that cannot be proven gets none.
    """
    started, gateway, name = time.perf_counter(), splitting(engine), exposure.version.name
    current = engine.aliases().get(alias)
    evicted = make_room(engine, name, {*keep, current or ""})
    handle = engine.load(exposure.version)
    probing = time.perf_counter()
    match = _prove(gateway, alias, exposure)
    probe_ms = (time.perf_counter() - probing) * 1e3
    stable = current or engine.capabilities().base
    routed = gateway.split(alias, stable, exposure.split, current)
    return Activation(
        alias=alias, version=name, previous=current, match=match, stage_ms=handle.stage_ms, commit_ms=handle.commit_ms,
        probe_ms=probe_ms, flip_ms=routed.flip_ms, total_ms=(time.perf_counter() - started) * 1e3, evicted=evicted,
        generation=handle.generation,
    )  # fmt: skip


def _prove(engine: Splitting, alias: str, exposure: Exposure) -> Match | None:
    """A candidate that cannot be proven loses its share at once."""
    try:
        return prove(engine, exposure.version.name, exposure.canaries) if engine.capabilities().can_probe else None
    except EngineRefused as error:
        withdraw(engine, alias)
        check_not_lost(engine, exposure.version.name, error)
        with contextlib.suppress(EngineUnavailable):  # what still runs on it ends in peace; room is made later
            engine.unload(exposure.version.name)
        raise


def withdraw(engine: Splitting, alias: str) -> bool:
    """All requests to the stable version again; whether anything had to be done."""
    if alias not in engine.splits():
        return False
    stable = engine.aliases()[alias]
    engine.split(alias, stable, None, stable)
    return True


def keep_exposed(engine: Engine, alias: str, exposure: Exposure | None, keep: Collection[str]) -> bool:
    """Make the table agree with what is desired; whether a candidate was given its share. Raises as `expose` does.

    The candidate is proven each time: an engine that has lost it, or answers with something else, must not go on.
    """
    if exposure is None:
        if isinstance(engine, Splitting):
            withdraw(engine, alias)
        return False
    gateway, name = splitting(engine), exposure.version.name
    is_loaded = any(row.name == name and row.state == "loaded" for row in engine.loaded())
    if is_loaded and gateway.splits().get(alias) == exposure.split:
        _prove(gateway, alias, exposure)
        return False
    expose(engine, alias, exposure, keep=keep)
    return True
