"""Which adapter lies in which slot, who uses it, and to which of them an alias points. No torch, no HTTP.

A request takes a lease on one adapter when it is admitted and keeps it to its end: whatever happens to the alias, it is
answered by that version. A slot is reused only when its adapter was unloaded and the last lease is gone.
"""

import logging
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from serving.aliases import AliasFile, Pointer
from serving.refusal import Refusal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,127}")
"""Of adapters and aliases: they stand in headers, metrics, paths and logs."""
log = logging.getLogger("serving")
Expected = str | None
ANYWHERE: Expected = "*"  # no condition on where an alias points; not a name that a model can have


@dataclass
class Adapter:
    """An adapter in a slot."""

    name: str
    path: str
    generation: str
    slot: int
    rank: int
    leases: int = 0
    draining: bool = False
    loaded_at: float = field(default_factory=time.time)

    def state(self) -> str:
        """`loaded` or `draining`."""
        return "draining" if self.draining else "loaded"


@dataclass(frozen=True)
class Lease:
    """What one request is answered by: the base (`adapter` None) or one adapter."""

    version: str
    adapter: Adapter | None


@dataclass(frozen=True)
class Flip:
    """A changed alias: where it pointed before, and how long the change took."""

    previous: str | None
    flip_ms: float
    """Replacing the reference: from one admission to the next."""
    persist_ms: float
    """Making it durable after that, before the answer."""
    persist_error: str | None = None
    """Why it is not durable: served, but forgotten by a restart. A rollback must work on a full disk, too."""


class Registry:
    """Thread-safe: leases are taken on the event loop and given back on the model's thread."""

    def __init__(self, base: str, slots: int, alias_file: Path | None = None) -> None:
        self.base = base
        self._lock = threading.Lock()
        self._flip_lock = threading.Lock()  # one alias change at a time, its fsync outside of `_lock`
        self._free = list(range(slots))
        self._adapters: dict[str, Adapter] = {}
        self._draining: list[Adapter] = []
        self._aliases: dict[str, str] = {}
        self._file = AliasFile(alias_file) if alias_file else None

    def recorded(self) -> dict[str, Pointer]:
        """The aliases of the alias file, as they stood when the last server ended, however it ended."""
        return self._file.read() if self._file else {}

    def reserve(self, name: str) -> int:
        """A free slot for a new name; `Refusal` 400: name in use, 429: slots drain, 409: all slots are taken."""
        _check_name(name)
        with self._lock:
            if name == self.base or name in self._adapters or name in self._aliases:
                raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
            if not self._free and self._draining:
                raise Refusal(429, f"all slots are in use, {len(self._draining)} of them drain", retry_after=1)
            if not self._free:
                raise Refusal(409, f"no free slot: unload one of {sorted(self._adapters)} first")
            return self._free.pop(0)

    def give_back(self, slot: int) -> None:
        """A reserved slot that was not filled."""
        with self._lock:
            self._free.append(slot)

    def publish(self, adapter: Adapter) -> None:
        """From now on requests may name it."""
        with self._lock:
            self._adapters[adapter.name] = adapter

    def lease(self, model: str) -> Lease:
        """Pin the one version that answers a request for `model`; `Refusal` 404 when nothing has that name."""
        with self._lock:
            version = self._aliases.get(model, model)
            if version == self.base:
                return Lease(version, None)
            adapter = self._adapters.get(version)
            if adapter is None:
                raise Refusal(404, f"The model `{model}` does not exist.")
            adapter.leases += 1
            return Lease(version, adapter)

    def release(self, lease: Lease) -> None:
        """The request has ended; the last one out of a draining adapter frees its slot."""
        with self._lock:
            if lease.adapter is not None:
                lease.adapter.leases -= 1
                self._reap()

    def unload(self, name: str, expected_generation: str | None = None) -> Adapter:
        """No new requests; its slot is free once the running ones have ended. `Refusal` 404, or 409 while in use."""
        with self._flip_lock, self._lock:
            adapter = self._adapters.get(name)
            if adapter is None:
                raise Refusal(404, f"The lora adapter '{name}' cannot be found.")
            if expected_generation not in (None, adapter.generation):
                raise Refusal(409, f"'{name}' has generation {adapter.generation}, not {expected_generation}")
            pointing = sorted(alias for alias, target in self._aliases.items() if target == name)
            if pointing:
                raise Refusal(409, f"alias {pointing[0]!r} points to '{name}': point it elsewhere first")
            del self._adapters[name]
            adapter.draining = True
            self._draining.append(adapter)
            self._reap()
            return adapter

    def _reap(self) -> None:
        for adapter in [a for a in self._draining if not a.leases]:
            self._draining.remove(adapter)
            self._free.append(adapter.slot)

    def point(self, alias: str, target: str, expected: Expected = ANYWHERE) -> Flip:
        """Point `alias` to a loaded adapter or the base: for the next admission at once, durable before this returns.

        A crash in between leaves the old target in the file and the caller without an answer: it asks again.
        `expected` is where the caller believes that it points (None: nowhere yet); `Refusal` 409 when it does not, 404
        for an unknown target, 400 for a name that is taken.
        """
        with self._flip_lock:
            previous = self._check_flip(alias, target, expected)
            started = time.perf_counter()
            with self._lock:
                self._aliases[alias] = target
            flipped = time.perf_counter()
            error = self._persist(self.aliases())
            return Flip(previous, (flipped - started) * 1e3, (time.perf_counter() - flipped) * 1e3, error)

    def adopt(self, alias: str, target: str) -> None:
        """Take an alias over from the alias file, which therefore is not written."""
        self._check_flip(alias, target, ANYWHERE)
        with self._lock:
            self._aliases[alias] = target

    def _check_flip(self, alias: str, target: str, expected: Expected) -> str | None:
        _check_name(alias)
        with self._lock:
            previous = self._aliases.get(alias)
            if alias == self.base or alias in self._adapters:
                raise Refusal(400, f"'{alias}' is the name of a model, not of an alias")
            if expected not in (ANYWHERE, previous):
                raise Refusal(409, f"alias '{alias}' points to {previous!r}, not to {expected!r}")
            if target != self.base and target not in self._adapters:
                raise Refusal(404, f"The lora adapter '{target}' cannot be found.")
            return previous

    def drop(self, alias: str) -> None:
        """Forget an alias; `Refusal` 404 when there is none."""
        with self._flip_lock:
            if alias not in self.aliases():
                raise Refusal(404, f"no alias '{alias}'")
            with self._lock:
                del self._aliases[alias]
            self._persist(self.aliases())

    def _persist(self, aliases: dict[str, str]) -> str | None:
        """What went wrong, if anything."""
        if self._file is None:
            return None
        loaded = {adapter.name: adapter for adapter in self.adapters() if not adapter.draining}
        try:
            self._file.write({alias: _pointer(target, loaded.get(target)) for alias, target in aliases.items()})
        except OSError as error:
            log.error("the aliases are served, but not written down: %s", error)
            return str(error)
        return None

    def adapters(self) -> list[Adapter]:
        """Loaded and draining ones, by slot."""
        with self._lock:
            return sorted([*self._adapters.values(), *self._draining], key=lambda adapter: adapter.slot)

    def aliases(self) -> dict[str, str]:
        """{alias: target}."""
        with self._lock:
            return dict(self._aliases)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise Refusal(400, f"{name[:80]!r} is not a name: {NAME.pattern}")


def _pointer(target: str, adapter: Adapter | None) -> Pointer:
    if adapter is None:
        return Pointer(target=target)
    return Pointer(target=target, path=adapter.path, generation=adapter.generation)
