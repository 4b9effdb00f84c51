"""The forward and backward pass of a LoRA linear layer, for frozen base weights and one flat gradient.

y = x W^T + b + s (d(x) A^T) B^T          (Hu et al., arXiv:2106.09685)
x: (tokens, inputs)  W: (outputs, inputs)  A: (rank, inputs)  B: (outputs, rank)  s: alpha / rank  d: dropout

peft computes the same; here the base weight gets no gradient, A and B are read in the compute precision from a working
copy that is refreshed once per optimiser step, and their gradients are added in place to views of the flat gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True, eq=False)
class LoraState:
    """What all LoRA layers of one adapter share."""

    enabled: bool = True
    """False: the base model alone answers."""
    dropout: float = 0.0
    """0 outside of training."""


@dataclass(slots=True, eq=False)
class LoraWeights:
    """One layer's parameters: float32 leaves, working copies in the compute precision, gradient views in float32."""

    A: nn.Parameter
    B: nn.Parameter
    work_a: Tensor
    work_b: Tensor
    gradient_a: Tensor
    gradient_b: Tensor
    scaling: float


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leaf: Tensor,  # noqa: ARG004 - requires grad, so that backward runs even where x does not
        weight: Tensor,
        bias: Tensor | None,
        lora: LoraWeights,
        kept: Tensor | None,
    ) -> Tensor:
        """kept: the dropout mask, scaled by 1 / (1 - p), or None."""
        flat = x.reshape(-1, x.shape[-1])
        dropped = flat if kept is None else flat * kept
        z = dropped @ lora.work_a.T
        y = torch.nn.functional.linear(flat, weight, bias)
        y.addmm_(z, lora.work_b.T, alpha=lora.scaling)
        ctx.save_for_backward(flat, weight, z, kept)
        ctx.lora, ctx.shape = lora, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        flat, weight, z, kept = ctx.saved_tensors
        lora: LoraWeights = ctx.lora
        (dy,) = gradients
        dy = dy.reshape(-1, dy.shape[-1])
        dz = (dy @ lora.work_b).mul_(lora.scaling)
        lora.gradient_b.add_(dy.T @ z, alpha=lora.scaling)
        dropped = flat if kept is None else flat * kept
        lora.gradient_a.add_(dz.T @ dropped)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        dx = dy @ weight
        if kept is None:
            dx.addmm_(dz, lora.work_a)
        else:
            dx.addcmul_(dz @ lora.work_a, kept)
        return dx.view(ctx.shape), None, None, None, None, None


def _dropout_mask(x: Tensor, probability: float) -> Tensor | None:
    """(tokens, inputs) of 0 and 1 / (1 - p), drawn from the default generator; None for p = 0."""
    if not probability:
        return None
    keep = 1 - probability
    return (
        torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)
    )


def lora_linear(x: Tensor, base: nn.Linear, lora: LoraWeights, state: LoraState) -> Tensor:
    """(..., outputs): the layer's answer to x (..., inputs), with the adapter where it is enabled."""
    if not state.enabled:
        return base(x)
    kept = _dropout_mask(x, state.dropout)
    return _LoraLinear.apply(x, lora.A, base.weight, base.bias, lora, kept)
