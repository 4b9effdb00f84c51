"""Elastic weight consolidation: parameters that mattered to the past are held near what they were.

Kirkpatrick et al., arXiv:1612.00796; online form Schwarz et al., arXiv:1805.06370:

    L(theta) + lambda/2 sum_i F_i (theta_i - theta*_i)^2          theta, theta*, F: (parameters,)

- F is the empirical Fisher information: the mean over examples of the squared gradient of *one* example (not the
  square of a batch's mean gradient, which shrinks with the batch size), so lambda means the same for any batch.
- F is scaled to mean 1 per update. An update that was memorised has nearly no gradient left (233 times less Fisher on
  learned facts than after a classification task was measured); unscaled, such an update would not be protected.
- The penalty is added to the gradient, lambda F (theta - theta*), after the backward pass. That is its exact
  derivative, costs no autograd graph, and holds wherever the loop can hand out a flat gradient.
- Penalties of several updates have one anchor: sum_k F_k (theta - theta_k)^2 = F (theta - mean)^2 + offset with
  F = sum_k F_k, mean = sum_k F_k theta_k / F. Memory: two vectors, for any number of updates.

The pre-training task can be an anchor too (`general`): F on general text at a fresh adapter, which is the base model.
There B = 0, so dL/dA = s B^T dL/dW = 0 and A gets no importance; dL/dB = s dL/dW A^T does not vanish. The anchor then
holds B near 0, which is first-order exact for dW = s B A at that A, but A may still grow under it. `kronecker` weighs
dW itself and has no such gap. That anchor exists only for an adapter whose first update is this one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.dataset import Item
from strategies.failure import Failure
from strategies.learner import JsonNotes, Learner, Loop


@dataclass(frozen=True, slots=True)
class Anchor:
    """The quadratic lambda/2 (sum_i F_i (theta_i - mean_i)^2 + offset)."""

    fisher: Tensor
    """(parameters,) float32"""
    mean: Tensor
    """(parameters,) float32"""
    offset: float = 0.0
    updates: int = 1

    def pull(self, theta: Tensor, strength: float) -> tuple[Tensor, float]:
        """The penalty's gradient (parameters,) and its value at theta."""
        away = theta - self.mean
        force = (self.fisher * away).mul_(strength)
        return force, (float(force @ away) + strength * self.offset) / 2

    def beside(self, theta: Tensor, name: str) -> "Anchor":
        """This anchor where the parameters are; raises `Failure` when they are those of another adapter."""
        fisher, mean = on_device(self.fisher, theta, name), on_device(self.mean, theta, name)
        return Anchor(fisher, mean, self.offset, self.updates)


def pulled(anchor: Anchor, strategy: Loop, name: str, strength: float) -> Anchor:
    """Add the penalty's gradient to this step's and report its value; the anchor, beside the parameters now."""
    theta = strategy.adapter.flat.detach()
    near = anchor.beside(theta, name)
    force, penalty = near.pull(theta, strength)
    strategy.adapter.gradient += force
    strategy.report(name, "penalty", penalty)
    return near


def importance(squares: Tensor, normalise: bool) -> Tensor:
    """Mean squared per-example gradients (parameters,) -> F, scaled to mean 1; all zero stays all zero."""
    mean = float(squares.double().mean())
    return squares / mean if normalise and mean > 0 else squares.clone()


def online(past: Anchor | None, fisher: Tensor, theta: Tensor, decay: float) -> Anchor:
    """F <- decay F + F_new around the latest weights: theta already minimises the old penalties plus the new loss."""
    if past is None:
        return Anchor(fisher, theta.clone())
    return Anchor(decay * past.fisher + fisher, theta.clone(), updates=past.updates + 1)


def separate(past: Anchor | None, fisher: Tensor, theta: Tensor, cap: int) -> Anchor:
    """The sum of one penalty per update, in one anchor; beyond `cap` updates it weighs as much as `cap` of them."""
    if past is None:
        return Anchor(fisher, theta.clone())
    total = past.fisher + fisher
    share = torch.where(total > 0, fisher / total, 1.0)
    away = theta - past.mean
    offset = past.offset + float((past.fisher * share * away * away).sum())
    weighed = min(past.updates, cap) + 1
    scale = min(1.0, cap / weighed)
    return Anchor(total * scale, past.mean + share * away, offset * scale, past.updates + 1)


def drawn(items: Sequence[Item], count: int, generator: torch.Generator) -> list[Item]:
    """At most `count` of `items`, drawn without replacement, without those that were cut before their first label."""
    whole = [item for item in items if item.label_tokens]
    order = torch.randperm(len(whole), generator=generator, device=generator.device)
    return [whole[int(index)] for index in order[:count]]


def on_device(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    """A stored vector beside the parameters; raises `Failure` when it belongs to an adapter of another size."""
    if tensor.shape[-1] != like.shape[-1]:
        raise Failure(
            "strategy_state",
            f"{name}: its state has {tensor.shape[-1]} parameters, the adapter {like.shape[-1]}: the rank or the"
            " targets have changed; start from a fresh adapter (a rebase) instead of the parent version",
        )
    return tensor.to(like.device, like.dtype)


class ElasticWeightConsolidation(Learner, supports_distributed=True):
    """EWC on the adapter's flat vector. State: fisher, mean (parameters,); notes: offset, updates."""

    name = "ewc"

    def __init__(self, parameters: catalog.Ewc) -> None:
        super().__init__()
        self.parameters = parameters
        self.anchor: Anchor | None = None

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:
        """The anchor of all past updates."""
        if tensors:
            self.anchor = Anchor(tensors["fisher"], tensors["mean"], notes["offset"], notes["updates"])

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """Nothing before the first anchor."""
        if self.anchor is None:
            return {}, {}
        tensors = {"fisher": self.anchor.fisher, "mean": self.anchor.mean}
        return tensors, {"offset": self.anchor.offset, "updates": self.anchor.updates}

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Anchor a fresh adapter on the pre-training task, when that is asked for and there is general text."""
        general = drawn(strategy.items["general"], self.parameters.samples, strategy.generator)
        if self.parameters.general and self.anchor is None and general:
            fisher = self._fisher(strategy, general) * self.parameters.general
            self.anchor = Anchor(fisher, strategy.adapter.flat.detach().clone(), updates=0)

    def after_backward(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """gradient += lambda F (theta - theta*)"""
        if self.anchor is None:
            return
        self.anchor = pulled(self.anchor, strategy, self.name, self.parameters.strength)

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Take this update's importances at the weights that are kept, and merge them into the anchor."""
        theta = strategy.adapter.flat.detach()
        items = drawn(strategy.items["new"], self.parameters.samples, strategy.generator)
        if not items:
            return
        fisher = self._fisher(strategy, items)
        past = None if self.anchor is None else self.anchor.beside(theta, self.name)
        if self.parameters.mode == "online":
            self.anchor = online(past, fisher, theta, self.parameters.decay)
        else:
            self.anchor = separate(past, fisher, theta, self.parameters.cap)
        strategy.report(self.name, "fisher_mean", float(self.anchor.fisher.mean()))
        strategy.report(self.name, "updates", self.anchor.updates)

    def _fisher(self, loop: Loop, items: Sequence[Item]) -> Tensor:
        return importance(loop.per_example_squared_gradients(items), self.parameters.normalise)
