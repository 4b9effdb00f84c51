"""Memory aware synapses: a parameter matters as far as the model's output moves with it, whatever the labels are.

Aljundi et al., arXiv:1711.09601:

    Omega_i = 1/N sum_examples |d/d theta_i  1/rows sum_rows ||f(row)||^2|        f: logits, (rows, vocabulary)
    L + lambda/2 sum_i Omega_i (theta_i - theta*_i)^2

Logits that all rise by the same amount say the same, so f is centred over the vocabulary first: only what changes the
answer counts. As no label enters, Omega does not vanish on what was memorised (the empirical Fisher information of
`ewc` does), and it could be taken on prompts without answers. Like there it is scaled to mean 1 per update, decays, and
is added to the gradient around the latest weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.dataset import Item
from strategies.ewc import Anchor, drawn, importance, online, pulled
from strategies.learner import JsonNotes, Learner, Loop


def energy(logits: Tensor, rows: slice) -> Tensor:  # noqa: ARG001 - a RowTerm
    """Sum over rows of the squared length of the centred logits. logits: (rows, vocabulary)"""
    return (logits - logits.mean(-1, keepdim=True)).square().sum()


def sensitivity(loop: Loop, items: Sequence[Item]) -> Tensor:
    """(parameters,) mean over `items` of the absolute gradient of the mean squared output."""
    total = torch.zeros_like(loop.adapter.gradient)
    for item in items:
        total += loop.gradient_of([item], energy).abs() / (item.label_tokens * len(items))
    return total


class MemoryAwareSynapses(Learner, supports_distributed=True):
    """MAS on the flat vector. State: importance and mean (parameters,)."""

    name = "mas"

    def __init__(self, parameters: catalog.MemoryAwareSynapses) -> None:
        super().__init__()
        self.parameters = parameters
        self.anchor: Anchor | None = None

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:
        """The importances of all past updates."""
        if tensors:
            self.anchor = Anchor(tensors["importance"], tensors["mean"], updates=notes["updates"])

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """Nothing before the first update has ended."""
        if self.anchor is None:
            return {}, {}
        return {"importance": self.anchor.fisher, "mean": self.anchor.mean}, {"updates": self.anchor.updates}

    def after_backward(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """gradient += lambda Omega (theta - theta*)"""
        if self.anchor is None:
            return
        self.anchor = pulled(self.anchor, strategy, self.name, self.parameters.strength)

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Measure what the kept weights' answers depend on, and recentre."""
        theta = strategy.adapter.flat.detach()
        items = drawn(strategy.items["new"], self.parameters.samples, strategy.generator)
        if not items:
            return
        past = None if self.anchor is None else self.anchor.beside(theta, self.name)
        self.anchor = online(past, importance(sensitivity(strategy, items), True), theta, self.parameters.decay)
        strategy.report(self.name, "updates", self.anchor.updates)
