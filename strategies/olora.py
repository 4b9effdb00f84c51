"""Orthogonal low-rank adaptation: every update learns in directions that the ones before it do not read.

Wang et al., arXiv:2310.14152:  L + lambda sum_{i < t} sum |A_i A_t^T|,  dW = s sum_i B_i A_i; only A_t and B_t move

    A_i: (slice rank, inputs) rows of A       B_i: (outputs, slice rank) columns of B

The paper keeps one adapter per task. Here the adapter has a fixed rank, and update t trains slice (t - 1) mod
(rank / slice rank) of it: the file stays an ordinary LoRA adapter of constant size, and engines need to know nothing.
When all slices are used the oldest is trained further (consolidate by a rebase before that where nothing may be lost).
The term's gradient is lambda sign(A_t P^T) P, with P (past rows, inputs) the rows of the other slices whose B is not
zero: a slice that was never trained changes nothing and constrains nothing.
"""

from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.failure import Failure
from strategies.freeze import Still
from strategies.kronecker import Layer, layers_of
from strategies.learner import Learner, Loop


def overlap(A: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """sum |A past^T| and its gradient with respect to A. A: (slice rank, inputs), past: (past rows, inputs)."""
    products = A @ past.T
    return products.abs().sum(), products.sign() @ past


def active_rows(rank: int, slice_rank: int, update: int) -> slice:
    """The rows of A (columns of B) that update number `update`, from 1, trains; raises `Failure` when none fit."""
    if slice_rank > rank or rank % slice_rank:
        reason = f"olora: slice_rank {slice_rank} must divide the adapter's rank {rank}; change one of them"
        raise Failure("bad_strategy", reason)
    start = (update - 1) % (rank // slice_rank) * slice_rank
    return slice(start, start + slice_rank)


def resting(layer: Layer, rows: slice) -> list[tuple[Tensor, Tensor]]:
    """Weights and gradients of the slices before and after the active one."""
    others = slice(0, rows.start), slice(rows.stop, len(layer.A))
    return [pair for part in others for pair in (
        (layer.A[part], layer.slope_a[part]), (layer.B[:, part], layer.slope_b[:, part]))]  # fmt: skip


class OrthogonalSlices(Learner, supports_distributed=True):
    """O-LoRA within one adapter. Nothing persists: which slice is whose follows from the update's number."""

    name = "olora"

    def __init__(self, parameters: catalog.OLora) -> None:
        super().__init__()
        self.parameters = parameters
        self.still = Still([])
        self.tasks: list[tuple[Tensor, Tensor, Tensor]] = []

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Choose the slice, freeze the others and gather the directions that they read."""
        layers = layers_of(strategy.adapter)
        rows = active_rows(len(layers[0].A), self.parameters.slice_rank, strategy.update)
        self.still = Still(pair for layer in layers for pair in resting(layer, rows))
        self.tasks = [(layer.A[rows], layer.slope_a[rows], self._past(layer, rows)) for layer in layers]
        strategy.report(self.name, "slice", rows.start // self.parameters.slice_rank)

    def after_backward(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Add the term's gradient; none for what rests."""
        total = torch.zeros((), device=strategy.adapter.flat.device)
        for A, gradient, past in self.tasks:
            value, slope = overlap(A, past)
            gradient.add_(slope, alpha=self.parameters.strength)
            total += value
        self.still.clear()
        strategy.report(self.name, "overlap", float(total))

    def after_training_iteration(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Take back what the optimiser did to the resting slices."""
        self.still.restore(strategy.adapter)

    def _past(self, layer: Layer, rows: slice) -> Tensor:
        is_used = layer.B.abs().sum(0) > 0
        is_used[rows] = False
        return layer.A[is_used].clone()
