"""What sets of weights have said about hold-outs and general text: asked once, not again by every update after.

Each update compares the candidate with the base and with the version before. Both have answered the hold-outs of the
past and the general text before, and neither has changed: their losses are kept in files of the cache, by a hash of the
weights and of everything that decides a number, and by a hash of the tokens. Only for general text the label states are
kept as well: those of players' words would say what the words were. A cache: damaged or missing, it is made anew.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from strategies.adapter import Adapter
from strategies.checkpoint import save_tensors
from strategies.dataset import Item

FILES, LOSSES, STATES = 8, 8192, 64
"""Kept sets of weights, and for each so many losses and states, the latest."""
KEY_BYTES = 16


class Remembered:
    """The answers of one set of weights, as far as they are known."""

    def __init__(self, directory: Path, adapter: Adapter, base_sha256: str) -> None:
        """Of the adapter's present weights; with the adapter disabled, of the base."""
        self.path = directory / f"{_weights_sha256(adapter, base_sha256)}.safetensors"
        self.losses: dict[bytes, float] = {}
        self.states: dict[bytes, Tensor] = {}
        self._read(adapter.device)

    def _read(self, device: torch.device) -> None:
        try:
            found = safetensors.torch.load_file(self.path)
            keys = [bytes(row) for row in found.pop("keys").tolist()]
            self.losses = dict(zip(keys, found.pop("losses").tolist(), strict=True))
            self.states = {bytes.fromhex(name): state.to(device) for name, state in found.items()}
            os.utime(self.path)  # used: not the next to go
        except (OSError, SafetensorError, KeyError, ValueError):
            self.losses, self.states = {}, {}

    def recall(self, adapter: Adapter, items: Sequence[Item]) -> dict[Item, Tensor]:
        """Give the adapter the losses that are known of `items`; returns the known states."""
        keys = {item: _key(item) for item in items}
        adapter.losses.update({item: self.losses[key] for item, key in keys.items() if key in self.losses})
        return {item: self.states[key] for item, key in keys.items() if key in self.states and key in self.losses}

    def keep(self, adapter: Adapter, items: Sequence[Item], states: dict[Item, Tensor]) -> None:
        """Remember what the adapter knows of `items` by now; writes a file where that is more than before."""
        losses = {_key(item): adapter.losses[item] for item in items if item in adapter.losses}
        said = {_key(item): state for item, state in states.items() if item.role == "probe"}
        if losses.keys() <= self.losses.keys() and said.keys() <= self.states.keys():
            return
        self.losses = dict(list((self.losses | losses).items())[-LOSSES:])
        self.states = dict(list((self.states | said).items())[-STATES:])
        tensors = {key.hex(): state for key, state in self.states.items()}
        tensors["keys"] = torch.tensor([list(key) for key in self.losses], dtype=torch.uint8).view(-1, KEY_BYTES)
        tensors["losses"] = torch.tensor(list(self.losses.values()), dtype=torch.float64)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = self.path.with_name(f".{os.getpid()}.{self.path.name}")  # trials of a search share the base's file
        save_tensors(own, tensors)
        own.replace(self.path)
        forget_old(self.path.parent)


def forget_old(directory: Path) -> None:
    """Only the files that were used last stay."""
    used: list[tuple[int, Path]] = []
    for path in directory.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another trainer forgets at the same time
            used.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(used, reverse=True)[FILES:]:
        path.unlink(missing_ok=True)


def _key(item: Item) -> bytes:
    """Equal for equal tokens and labels."""
    return hashlib.sha256(f"{item.start} {list(item.tokens)}".encode()).digest()[:KEY_BYTES]


def _weights_sha256(adapter: Adapter, base_sha256: str) -> str:
    """Of all that decides what the model says: base, precision, way of computing, library, and the adapter in use."""
    digest = hashlib.sha256(f"{base_sha256} {adapter.computes} {torch.__version__}".encode())
    if adapter.state.enabled:
        digest.update(f"{adapter.lora}".encode())
        digest.update(adapter.flat.cpu().numpy().tobytes())
    return digest.hexdigest()
