"""What an engine should serve against what it does: mended every few seconds, and after its restart."""

from collections.abc import Collection
from typing import Any

import msgspec

from daemon.engines.activate import Activation, activate
from daemon.engines.contract import Engine, EngineRefused, EngineUnavailable, Version
from daemon.engines.exposure import Exposure, Splitting, keep_exposed, withdraw
from strategies.request import Canary


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What an alias should point to."""

    alias: str
    version: Version | None
    """None: the base."""
    canaries: list[Canary] = []
    previous: Version | None = None
    """Kept loaded, so that a rollback is only a flip."""
    exposure: Exposure | None = None
    """A candidate that has a share of the requests."""


class Reconciled(msgspec.Struct, frozen=True, kw_only=True):
    """What had to be done to make an engine serve what is desired."""

    epoch: str
    activations: list[Activation] = []
    reloaded: list[str] = []
    errors: dict[str, str] = {}
    """By alias: what could not be restored, and why; the others were."""
    turned_down: dict[str, str] = {}
    """By alias: why its candidate has lost its share."""
    traffic: dict[str, Any] | None = None
    """How the versions have done, while any alias is shared."""
    aliases: dict[str, str] = {}
    """With it: each alias's stable version."""


def reconcile(engine: Engine, desired: list[Desired], known_epoch: str = "") -> Reconciled:
    """Make an engine serve what is desired, as after its restart; probes again whenever the epoch is a new one.

    Cheap when nothing changed: one look at health, listing and aliases. What cannot be restored is reported by alias
    and does not stop the others. Raises `EngineUnavailable` when the engine does not answer at all.
    """
    health = engine.health()
    if not health.ok:
        raise EngineUnavailable(f"the engine is down: {health.reason}")
    reborn = health.epoch != known_epoch
    done = Reconciled(epoch=health.epoch)
    keep = {wish.previous.name for wish in desired if wish.previous}
    keep |= {wish.exposure.version.name for wish in desired if wish.exposure}
    for wish in desired:
        try:
            activation = _restore(engine, wish, keep, reborn)
            done.activations.extend([activation] if activation else [])
            if not _expose(engine, wish, keep, done):
                done.reloaded.extend(_reload_previous(engine, wish))
        except (EngineRefused, EngineUnavailable) as error:
            done.errors[wish.alias] = str(error)
    if isinstance(engine, Splitting) and any(wish.exposure for wish in desired):
        return msgspec.structs.replace(done, traffic=engine.traffic(), aliases=engine.aliases())
    return done


def _expose(engine: Engine, wish: Desired, keep: Collection[str], done: Reconciled) -> bool:
    """Whether the candidate has been loaded just now; a refusal is the candidate's end, not the alias's."""
    try:
        return keep_exposed(engine, wish.alias, wish.exposure, keep)
    except EngineRefused as error:
        done.turned_down[wish.alias] = str(error)
        return False


def _restore(engine: Engine, wish: Desired, keep: Collection[str], reborn: bool) -> Activation | None:
    current = engine.aliases().get(wish.alias)
    if wish.version is None:
        base = engine.capabilities().base
        if current != base:
            engine.route(wish.alias, base, current)
        return None
    loaded = {row.name for row in engine.loaded() if row.state == "loaded"}
    if current == wish.version.name and wish.version.name in loaded and not reborn:
        return None
    if isinstance(engine, Splitting):
        withdraw(engine, wish.alias)  # a candidate is lost as well; it comes back once it is loaded and proven again
    return activate(engine, wish.alias, wish.version, wish.canaries, keep=keep)


def _reload_previous(engine: Engine, wish: Desired) -> list[str]:
    """Load the previous version again while there is a free slot for it."""
    if wish.previous is None:
        return []
    names = [row.name for row in engine.loaded()]
    if wish.previous.name in names or len(names) >= engine.capabilities().slots:
        return []
    engine.load(wish.previous)
    return [wish.previous.name]
