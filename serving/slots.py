"""The adapters' places in the model: K slots of a fixed maximal rank beside every linear layer.

All slots of a layer stand side by side in one pair of matrices, so a batch whose rows use different adapters is
    y = x W^T + mask(x A^T) B        x: (rows, tokens, inputs)   A: (slots * rank, inputs)   B: (slots * rank, outputs)
where `mask` zeroes, row by row, what belongs to other slots. Smaller ranks are padded with zeros, which add nothing.
"""

import torch
from torch import nn

from serving.artifact import Pair
from serving.refusal import Refusal

BASE = -1  # the slot of a row that uses no adapter


class Selection:
    """Which slot each row of the batch uses in the coming forward pass; one object shared by all layers."""

    def __init__(self, slots: int, rank: int, device: torch.device) -> None:
        self._owner = torch.arange(slots, device=device).repeat_interleave(rank)  # (slots * rank,)
        self._rank = rank
        self.columns = slice(0, 0)  # the part of A and B that this batch needs; empty: the base alone
        self.foreign: torch.Tensor | None = None  # (rows, 1, columns): True where a row must not see a slot

    def choose(self, slots: list[int]) -> None:
        """One slot (or BASE) per row."""
        used = sorted(set(slots) - {BASE})
        self.columns = slice(used[0] * self._rank, (used[-1] + 1) * self._rank) if used else slice(0, 0)
        if len(set(slots)) <= 1:
            self.foreign = None
        else:
            rows = torch.tensor(slots, device=self._owner.device)
            self.foreign = (self._owner[self.columns] != rows[:, None])[:, None, :]


class SlotLinear(nn.Module):
    """A linear layer with room for K adapters."""

    def __init__(self, linear: nn.Linear, slots: int, rank: int, selection: Selection) -> None:
        super().__init__()
        weight = linear.weight
        self.linear, self.rank, self.selection = linear, rank, selection
        self.a = torch.zeros(slots * rank, linear.in_features, dtype=weight.dtype, device=weight.device)
        self.b = torch.zeros(slots * rank, linear.out_features, dtype=weight.dtype, device=weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (rows, tokens, inputs) -> (rows, tokens, outputs)."""
        y: torch.Tensor = self.linear(x)
        columns = self.selection.columns
        if columns.start == columns.stop:
            return y
        h = nn.functional.linear(x, self.a[columns])
        if self.selection.foreign is not None:
            h = h.masked_fill(self.selection.foreign, 0.0)
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.b[columns]).view_as(y)

    def check(self, name: str, pair: Pair) -> None:
        """`Refusal` 400 unless the pair is for a layer of this shape."""
        found, own = (pair.a.shape[1], pair.b.shape[0]), (self.a.shape[1], self.b.shape[1])
        if found != own:
            raise Refusal(400, f"{name}: the adapter is for a layer of (inputs, outputs) {found}, the base's is {own}")


class SlotBank:
    """Every `SlotLinear` of a model."""

    def __init__(self, model: nn.Module, head: nn.Module | None, slots: int, rank: int, device: torch.device) -> None:
        """Put a `SlotLinear` in the place of every `nn.Linear` of `model` but its `head`."""
        self.slots, self.rank = slots, rank
        self.selection = Selection(slots, rank, device)
        self.layers: dict[str, SlotLinear] = {}
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        for name, module in linears:
            parent, _, child = name.rpartition(".")
            self.layers[name] = SlotLinear(module, slots, rank, self.selection)
            setattr(model.get_submodule(parent), child, self.layers[name])
        # Adapters are laid out here, always in the same memory: 10 MB of new pages took longer than filling them
        places = self._places(0)
        self._device, self._shapes = device, [place.shape for place in places]
        self._room = torch.zeros(
            sum(place.numel() for place in places), dtype=places[0].dtype, pin_memory=device.type == "cuda"
        )
        self._parts = self._split(self._room)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one adapter of the maximal rank in float32: no fitting file is larger than this and its header."""
        return sum(4 * self.rank * (layer.a.shape[1] + layer.b.shape[1]) for layer in self.layers.values())

    def prepare(self, pairs: dict[str, Pair]) -> list[torch.Tensor]:
        """What `commit` copies, in order; off the decoding thread. Valid until the next call, which overwrites it.

        Raises `Refusal` 400 for a module without a slot, a wrong shape, and for NaN or infinity after scaling and
        conversion: masked or not, one such weight would reach every row of a mixed batch (0 * NaN is NaN).
        """
        unknown = sorted(pairs.keys() - self.layers.keys())
        if unknown:
            raise Refusal(
                400, f"the base has no linear layer {unknown[0]!r} ({len(unknown)} such modules): wrong base?"
            )
        self._room.zero_()
        for (name, layer), a, b in zip(self.layers.items(), self._parts[::2], self._parts[1::2], strict=True):
            if (pair := pairs.get(name)) is not None:
                layer.check(name, pair)
                a[: pair.a.shape[0]].copy_(pair.a)
                torch.mul(pair.b.T, pair.scale, out=b[: pair.b.shape[1]])
        if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(self._room)):  # both carry a NaN on
            raise Refusal(400, f"the adapter has NaN or infinite weights in {self._room.dtype}")
        return self._parts if self._device.type == "cpu" else self._split(self._room.to(self._device))

    def commit(self, slot: int, tensors: list[torch.Tensor]) -> None:
        """Overwrite a free slot, between two forward passes."""
        torch._foreach_copy_(self._places(slot), tensors)

    def _split(self, room: torch.Tensor) -> list[torch.Tensor]:
        """One view per place of a slot."""
        parts = room.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _places(self, slot: int) -> list[torch.Tensor]:
        """(rank, inputs) and (rank, outputs) of every layer, alternating."""
        part = slice(slot * self.rank, (slot + 1) * self.rank)
        return [side[part] for layer in self.layers.values() for side in (layer.a, layer.b)]
