"""From a published version to the live one: load, probe, flip."""

import time
from collections.abc import Collection

import msgspec

from daemon.engines.contract import Engine, EngineRefused, EngineUnavailable, ProbeFailed, Version
from daemon.engines.proof import TOLERANCE_NATS, Match, judge
from strategies.request import Canary


class Activation(msgspec.Struct, frozen=True, kw_only=True):
    """A version that went live, and what it took."""

    alias: str
    version: str
    previous: str | None
    match: Match | None
    """None for an engine that cannot be probed."""
    stage_ms: float
    commit_ms: float
    probe_ms: float
    flip_ms: float
    total_ms: float
    evicted: list[str]
    generation: str | None


def activate(
    engine: Engine,
    alias: str,
    version: Version,
    canaries: list[Canary],
    *,
    keep: Collection[str] = (),
    tolerance: float = TOLERANCE_NATS,
) -> Activation:
    """Load `version`, prove that the engine answers with it, and point `alias` to it.

    Until the flip nothing changes for players. Raises `ProbeFailed` or `EngineRefused` (the version cannot be served
    there; it has been unloaded again) and `EngineUnavailable` (try again); the alias then points where it did.
    `keep`: names that must stay loaded besides every alias's target, such as other models' previous versions.
    """
    started = time.perf_counter()
    current = engine.aliases().get(alias)
    evicted = make_room(engine, version.name, keep)
    handle = engine.load(version)
    probing = time.perf_counter()
    try:
        can_probe = engine.capabilities().can_probe
        match = prove(engine, version.name, canaries, tolerance) if can_probe else None
    except EngineRefused as error:
        check_not_lost(engine, version.name, error)
        if current != version.name:
            engine.unload(version.name)
        raise
    probe_ms = (time.perf_counter() - probing) * 1e3
    flip_ms = 0.0 if current == version.name else engine.route(alias, version.name, current).flip_ms
    _confirm(engine, alias, version.name, current, canaries[:1])
    return Activation(
        alias=alias, version=version.name, previous=current, match=match, stage_ms=handle.stage_ms,
        commit_ms=handle.commit_ms, probe_ms=probe_ms, flip_ms=flip_ms, generation=handle.generation,
        total_ms=(time.perf_counter() - started) * 1e3, evicted=evicted,
    )  # fmt: skip


def make_room(engine: Engine, name: str, keep: Collection[str] = ()) -> list[str]:
    """Unload the oldest adapters that no alias points to until one more fits; their names.

    One without running requests goes first: its slot is free at once.
    """
    listing = engine.loaded()
    if any(row.name == name and row.state == "loaded" for row in listing):
        return []
    protected = {*engine.aliases().values(), *keep}
    idle = [row for row in listing if row.name not in protected and row.state == "loaded"]
    draining = sum(row.state == "draining" for row in listing)  # their slots come free by themselves
    surplus = len(listing) - draining + 1 - engine.capabilities().slots
    going = [row.name for row in sorted(idle, key=lambda row: row.leases > 0)[: max(surplus, 0)]]
    for evicted in going:
        engine.unload(evicted)
    return going


def check_not_lost(engine: Engine, name: str, error: EngineRefused) -> None:
    """Raise `EngineUnavailable` if the engine was restarted under our hands: what it says then proves nothing."""
    if all(row.name != name for row in engine.loaded()):
        raise EngineUnavailable(f"the engine has lost {name} since it was loaded, as by a restart: {error}") from error


def prove(engine: Engine, name: str, canaries: list[Canary], tolerance: float = TOLERANCE_NATS) -> Match:
    """Raise `ProbeFailed` unless `name` scores the canaries as the trainer's candidate did and not as the base does."""
    if not canaries or not all(canary.token_ids and canary.prompt_token_ids for canary in canaries):
        raise ProbeFailed(f"{name}: no canaries with token ids, so nothing can prove that it is served")
    found = engine.probe(name, canaries)
    if found.served_by != name:
        raise ProbeFailed(f"asked for {name}, the engine answered with {found.served_by}")
    base = engine.probe(engine.capabilities().base, canaries)
    return judge(name, found.logprobs, base.logprobs, canaries, tolerance)


def _confirm(engine: Engine, alias: str, name: str, before: str | None, canaries: list[Canary]) -> None:
    """The alias itself must answer with the version; else it goes back to where it pointed."""
    if not engine.capabilities().moves_aliases:
        return
    answered = engine.probe(alias, canaries).served_by
    if answered == name:
        return
    engine.route(alias, before or engine.capabilities().base, name)
    raise ProbeFailed(f"{alias} was pointed to {name}, but the engine answers it with {answered}")
