"""Synaptic intelligence: importances from the path that training took, with no pass over the data afterwards.

Zenke, Poole & Ganguli, arXiv:1703.04200:

    omega_i = sum_steps -g_i (theta_i' - theta_i)      what parameter i contributed to the fall of the loss
    Omega_i = sum_updates max(omega_i, 0) / ((theta_i,end - theta_i,start)^2 + xi)
    L + lambda/2 sum_i Omega_i (theta_i - theta*_i)^2

g is the gradient of the batch before any penalty, theta' the weights after the optimiser's step (whichever optimiser
that is), theta* the weights at the end of the last update. Each update's share is scaled to mean 1, as in `ewc`,
because omega has the unit of the loss. Cost: two vectors and two passes over them per step; no extra backward pass.
When early stopping puts back earlier weights, the path beyond them still counts: it was walked on the same loss.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.ewc import Anchor, importance, on_device, pulled
from strategies.learner import JsonNotes, Learner, Loop


def consolidated(path: Tensor, moved: Tensor, damping: float) -> Tensor:
    """omega, theta_end - theta_start (parameters,) -> an update's Omega, scaled to mean 1.

    `damping` is xi in units of the mean squared move, so that it means the same at any learning rate.
    """
    square = moved * moved
    return importance(path.clamp_min(0) / (square + damping * square.mean() + torch.finfo(square.dtype).tiny), True)


class SynapticIntelligence(Learner, supports_distributed=True):
    """SI on the flat vector. State: importance and mean (parameters,); within a run also the path so far."""

    name = "si"

    def __init__(self, parameters: catalog.SynapticIntelligence) -> None:
        super().__init__()
        self.parameters = parameters
        self.anchor: Anchor | None = None
        self.path: Tensor | None = None
        self.start = self.departure = self.gradient = torch.empty(0)

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:
        """The importances of all past updates; at a checkpoint the path of this one as well."""
        if "importance" in tensors:
            self.anchor = Anchor(tensors["importance"], tensors["mean"], updates=notes["updates"])
        self.path = tensors.get("path")

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """Importances, anchor, and the path while there is one."""
        tensors = {} if self.path is None else {"path": self.path}
        if self.anchor is None:
            return tensors, {}
        return tensors | {"importance": self.anchor.fisher, "mean": self.anchor.mean}, {"updates": self.anchor.updates}

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """The path starts at the parent's weights."""
        self.start = strategy.adapter.flat.detach().clone()
        self.path = torch.zeros_like(self.start)

    def after_backward(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Remember the loss's own gradient, then add the penalty's."""
        theta = strategy.adapter.flat.detach()
        self.gradient, self.departure = strategy.adapter.gradient.clone(), theta.clone()
        if self.anchor is None:
            return
        self.anchor = pulled(self.anchor, strategy, self.name, self.parameters.strength)

    def after_training_iteration(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """omega -= g (theta' - theta)"""
        assert self.path is not None
        self.path = on_device(self.path, self.gradient, self.name)
        self.path -= self.gradient * (strategy.adapter.flat.detach() - self.departure)

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Turn the path into importances, and anchor at the weights that are kept."""
        theta = strategy.adapter.flat.detach()
        if self.path is None or not strategy.items["new"]:
            return
        total = consolidated(on_device(self.path, theta, self.name), theta - self.start, self.parameters.damping)
        past = 0 if self.anchor is None else self.anchor.updates
        if self.anchor is not None:
            total += self.parameters.decay * on_device(self.anchor.fisher, theta, self.name)
        self.anchor, self.path = Anchor(total, theta.clone(), updates=past + 1), None
        strategy.report(self.name, "updates", self.anchor.updates)
