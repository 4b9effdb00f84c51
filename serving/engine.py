"""The engine behind the HTTP routes: model, scheduler and registry, and the life of an adapter between them."""

import logging
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from serving.artifact import Staged, stage
from serving.model import Dtype, ServedModel
from serving.refusal import Refusal
from serving.registry import Adapter, Flip, Registry
from serving.scheduler import Scheduler
from serving.tensors import HEADER_BYTES

log = logging.getLogger("serving")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How the server was started."""

    base: Path
    adapter_root: Path
    served_name: str = "base"
    slots: int = 3
    max_rank: int = 16
    streams: int = 8
    """Requests that are decoded together."""
    max_waiting: int = 64
    """Requests that may queue behind them before clients get a 429."""
    context: int = 2048
    """Tokens of prompt and answer together; the model's own limit if that is lower."""
    threads: int = 1
    dtype: Dtype = "auto"
    device: str = "cpu"
    alias_file: Path | None = None


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What loading an adapter took."""

    adapter: Adapter
    stage_ms: float
    """Read, verify and lay out in memory, beside the running requests."""
    commit_ms: float
    """Copy into the slot, between two steps."""
    wait_ms: float
    """From handing the copy to the model's thread until it was done: the rest of the running step, and the copy."""


class Engine:
    """One base model, its adapters and its aliases."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.epoch = secrets.token_hex(8)
        self.model = ServedModel(
            options.base, slots=options.slots, max_rank=options.max_rank, rows=options.streams,
            context=options.context, dtype=options.dtype, device=options.device,
        )  # fmt: skip
        self.registry = Registry(options.served_name, options.slots, options.alias_file)
        self.scheduler = Scheduler(self.model, max_waiting=options.max_waiting, threads=options.threads)
        self.lost: dict[str, str] = {}
        """Recorded aliases that could not be restored at the start, with the reason."""
        self._loading = threading.Lock()

    def load(self, name: str, path: str, expected_generation: str | None = None) -> Loaded:
        """Stage an adapter, commit it to a free slot, publish its name. Blocks; call it off the event loop.

        Raises `Refusal`: 429 while another load runs, 409 when the files are not of `expected_generation`, and what
        `stage`, `prepare` and `reserve` raise. Nothing changes in what is served unless it returns.
        """
        if not self._loading.acquire(blocking=False):
            raise Refusal(429, "another adapter is being loaded", retry_after=1)
        try:
            slot = self.registry.reserve(name)
            try:
                return self._fill(slot, name, path, expected_generation)
            except BaseException:
                self.registry.give_back(slot)
                raise
        finally:
            self._loading.release()

    def _fill(self, slot: int, name: str, path: str, expected_generation: str | None) -> Loaded:
        started = time.perf_counter()
        bank = self.model.bank
        largest = bank.slot_bytes + HEADER_BYTES
        staged = stage(self.options.adapter_root, path, self.options.max_rank, largest, bank.prepare)
        if expected_generation not in (None, staged.generation):
            raise Refusal(409, f"{staged.path} has generation {staged.generation}, not {expected_generation}")
        ready = time.perf_counter()
        spent: list[float] = []

        def commit() -> None:
            begun = time.perf_counter()
            bank.commit(slot, staged.tensors)
            spent.append(time.perf_counter() - begun)

        self.scheduler.between_steps(commit).result()
        waited = time.perf_counter() - ready
        adapter = _adapter(name, path, staged, slot)
        self.registry.publish(adapter)
        log.info("loaded %s (%s) into slot %d", name, staged.generation[:12], slot)
        return Loaded(adapter=adapter, stage_ms=(ready - started) * 1e3, commit_ms=spent[0] * 1e3, wait_ms=waited * 1e3)

    def point(self, alias: str, target: str, expected: str | None) -> Flip:
        """Point an alias to a loaded adapter or the base (see `Registry.point`)."""
        flip = self.registry.point(alias, target, expected)
        self.lost.pop(alias, None)
        log.info("alias %s: %s -> %s", alias, flip.previous, target)
        return flip

    def restore(self) -> None:
        """Load what the recorded aliases pointed to and point them there again; what fails is in `lost`."""
        try:
            recorded = self.registry.recorded()
        except msgspec.DecodeError as error:
            log.error("%s is damaged (%s): starting without aliases", self.options.alias_file, error)
            return
        for pointer in {p.target: p for p in recorded.values() if p.path is not None}.values():
            try:
                self.load(pointer.target, pointer.path or "", pointer.generation)
            except Refusal as refusal:
                self.lost |= {alias: refusal.message for alias, p in recorded.items() if p == pointer}
        for alias, pointer in recorded.items():
            if alias not in self.lost:
                self.registry.adopt(alias, pointer.target)
        for alias, reason in self.lost.items():
            log.error("alias %s is not served: %s", alias, reason)

    def health(self) -> dict[str, Any]:
        """Body of `/health`."""
        running, waiting = self.scheduler.load()
        return {
            "ok": self.scheduler.is_alive(),
            "epoch": self.epoch,
            "base": self.options.served_name,
            "slots": self.options.slots,
            "running": running,
            "waiting": waiting,
            "lost_aliases": self.lost,
        }


def _adapter(name: str, path: str, staged: Staged, slot: int) -> Adapter:
    return Adapter(name=name, path=path, generation=staged.generation, slot=slot, rank=staged.rank)
