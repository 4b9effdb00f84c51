"""The forward and backward pass of LoRA linear layers, for frozen base weights and one flat gradient.

y = x W^T + b + s (d(x) A^T) B^T          (Hu et al., arXiv:2106.09685)
x: (tokens, inputs)  W: (outputs, inputs)  A: (rank, inputs)  B: (outputs, rank)  s: alpha / rank  d: dropout

peft computes the same; here the base weight gets no gradient, A and B are read in the compute precision from a working
copy that is refreshed once per optimiser step, and their gradients are added in place to views of the flat gradient.
Layers with one input (q, k, v; gate, up) form a group: one product with their stacked A.

Dropout: one pool of random bits per forward pass; every layer reads it through a window of its own. Each mask is
Bernoulli and independent over tokens and inputs; masks of different layers share bits, shifted. (Drawing every mask
anew was 27 % of a training step.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

WINDOW_SHIFT = 8
"""Inputs by which the window of one layer is shifted against the layer before."""


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Dropout of one forward pass."""

    pool: Tensor
    """(tokens, widest input + shifts) 0 or 1"""
    gain: float
    """1 / (1 - p): what keeps the expectation"""

    def first(self, tokens: int) -> "Masks":
        """Of so many tokens only."""
        return Masks(self.pool[:tokens], self.gain)

    def window(self, place: int, width: int) -> Tensor:
        """(tokens, width) mask of the layer at `place`."""
        start = place * WINDOW_SHIFT
        return self.pool[:, start : start + width]


def draw_masks(probability: float, tokens: int, width: int, like: Tensor) -> Masks | None:
    """Masks for layers of at most `width` inputs + shifts; p is realised in steps of 1/256; None for p = 0."""
    threshold = round(probability * 256)
    if not threshold:
        return None
    words = torch.empty(tokens, -(-width // 8), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    return Masks((words.view(torch.uint8) >= threshold).to(like.dtype), 256 / (256 - threshold))


@dataclass(slots=True, eq=False)
class LoraState:
    """What all LoRA layers of one adapter share."""

    enabled: bool = True
    """False: the base model alone answers."""
    by_layers: bool = False
    """The base's weights are not here whole (sharded, quantised): each layer is called, never its weight."""
    recomputes: bool = False
    """Of a layer only its input is kept for the backward pass, which computes the rest again (Chen et al.,
    arXiv:1604.06174): half as much work again, a fraction of the memory."""
    dropout: float = 0.0
    """0 outside of training"""
    masks: Masks | None = None
    """Of the forward pass that is going on."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """One layer's parameters: float32 leaves, working copies in the compute precision, gradient views in float32."""

    A: nn.Parameter
    B: nn.Parameter
    work_a: Tensor
    work_b: Tensor
    gradient_a: Tensor
    gradient_b: Tensor
    scaling: float
    place: int
    """Which window of the dropout pool it reads."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraGroup:
    """Adapters of layers with one input, and which columns of the stacked output each of them adds to."""

    members: tuple[LoraWeights, ...]
    outputs: tuple[slice, ...]
    work_a: Tensor = field(init=False)
    """(sum of ranks, inputs)"""
    gradient_a: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "work_a", stacked([member.work_a for member in self.members]))
        object.__setattr__(self, "gradient_a", stacked([member.gradient_a for member in self.members]))

    def ranks(self) -> list[slice]:
        """Which columns of z = x A^T belong to each member."""
        rank = self.members[0].work_a.shape[0]
        return [slice(place * rank, (place + 1) * rank) for place in range(len(self.members))]

    def dropped(self, x: Tensor, masks: Masks | None) -> Tensor:
        """x after dropout; the gain is left to the scaling."""
        return x if masks is None else x * masks.window(self.members[0].place, x.shape[1])

    def scaling(self, masks: Masks | None) -> float:
        """alpha / rank, with dropout's gain."""
        return self.members[0].scaling * (masks.gain if masks else 1.0)

    def add_forward(self, x: Tensor, y: Tensor, masks: Masks | None) -> Tensor:
        """Add the adapters' part to y (tokens, outputs) in place; returns z (tokens, sum of ranks)."""
        z = self.dropped(x, masks) @ self.work_a.T
        for member, columns, rank in zip(self.members, self.outputs, self.ranks(), strict=True):
            y[:, columns].addmm_(z[:, rank], member.work_b.T, alpha=self.scaling(masks))
        return z

    def add_backward(self, x: Tensor, z: Tensor, dy: Tensor, dx: Tensor | None, masks: Masks | None) -> None:
        """Add the adapters' gradients to the flat one, and their part of dx (tokens, inputs) in place."""
        scaling, dz = self.scaling(masks), torch.empty_like(z)
        for member, columns, rank in zip(self.members, self.outputs, self.ranks(), strict=True):
            torch.mm(dy[:, columns], member.work_b, out=dz[:, rank])
            member.gradient_b.add_(dy[:, columns].T @ z[:, rank], alpha=scaling)
        dz.mul_(scaling)
        self.gradient_a.add_(dz.T @ self.dropped(x, masks))
        if dx is not None and masks is None:
            dx.addmm_(dz, self.work_a)
        elif dx is not None and masks is not None:
            dx.addcmul_(dz @ self.work_a, masks.window(self.members[0].place, x.shape[1]))


def stacked(views: Sequence[Tensor]) -> Tensor:
    """One view over neighbouring (rows, columns) views of one vector; raises `ValueError` for others."""
    first, rows = views[0], sum(len(view) for view in views)
    offset = first.storage_offset()
    for view in views:
        if view.storage_offset() != offset or view.shape[1] != first.shape[1]:
            raise ValueError("these LoRA weights do not lie side by side in the flat vector")
        offset += view.numel()
    return torch.as_strided(first, (rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leaf: Tensor,  # noqa: ARG004 - requires grad, so that backward runs even where x does not
        base: nn.Linear,
        group: LoraGroup,
        masks: Masks | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.nn.functional.linear(flat, base.weight, base.bias)
        z = group.add_forward(flat, y, masks)
        ctx.save_for_backward(flat, z)
        ctx.weight, ctx.group, ctx.masks, ctx.shape = base.weight, group, masks, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        flat, z = ctx.saved_tensors
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])
        dx = dy @ ctx.weight if ctx.needs_input_grad[0] else None
        ctx.group.add_backward(flat, z, dy, dx, ctx.masks)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None


class _LoraPart(torch.autograd.Function):
    """s (d(x) A^T) B^T alone: the frozen product is its layer's own, wherever the layer keeps its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leaf: Tensor,  # noqa: ARG004 - requires grad, as above
        group: LoraGroup,
        masks: Masks | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat.new_zeros(len(flat), sum(len(member.work_b) for member in group.members))
        z = group.add_forward(flat, y, masks)
        ctx.save_for_backward(flat, z)
        ctx.group, ctx.masks, ctx.shape = group, masks, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        flat, z = ctx.saved_tensors
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])
        dx = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        ctx.group.add_backward(flat, z, dy, dx, ctx.masks)
        return None if dx is None else dx.view(ctx.shape), None, None, None


def lora_linear(x: Tensor, base: nn.Linear, group: LoraGroup, state: LoraState) -> Tensor:
    """(..., outputs): the layer's answer to x (..., inputs), with the adapter where it is enabled."""
    if not state.enabled:
        return base(x)
    if state.by_layers:
        return base(x) + _LoraPart.apply(x, group.members[0].A, group, state.masks)
    return _LoraLinear.apply(x, group.members[0].A, base, group, state.masks)
