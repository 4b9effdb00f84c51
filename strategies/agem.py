"""Averaged GEM: a step may not raise the average loss on a random batch of memories, to first order.

Chaudhry et al., arXiv:1812.00420:  g~ = g - (g . g_ref / g_ref . g_ref) g_ref  if g . g_ref < 0, else g

    g, g_ref: (parameters,); g_ref: gradient of one batch drawn anew at each step from the memories of all past updates

One more forward and backward pass per step and one more vector, whatever the number of past updates.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.ewc import drawn
from strategies.learner import JsonNotes, Learner, Loop


def project(g: Tensor, reference: Tensor) -> Tensor | None:
    """The closest gradient (parameters,) to g that does not harm the reference; None where g does not."""
    harm = torch.dot(g, reference)
    square = torch.dot(reference, reference)
    if harm >= 0 or square == 0:
        return None
    return g - (harm / square) * reference


class AveragedGem(Learner, supports_distributed=True):
    """A-GEM on the adapter's flat gradient. The memory is the experience's `memory` rows: nothing persists."""

    name = "agem"

    def __init__(self, parameters: catalog.AGem) -> None:
        super().__init__()
        self.parameters = parameters
        self.reference: Tensor | None = None
        self.projections = 0

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:  # noqa: ARG002 - no tensors
        """A resumed run goes on counting."""
        self.projections = notes.get("projections", 0)

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """The count of this run so far; between updates nothing."""
        return {}, {"projections": self.projections} if self.projections else {}

    def before_training_iteration(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """The gradient of a batch of constant size, drawn from all memories alike."""
        batch = drawn(strategy.items["memory"], self.parameters.examples, strategy.generator)
        self.reference = strategy.gradient_of(batch) if batch else None

    def after_backward(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Remove the component of the gradient that would raise the loss on that batch."""
        if self.reference is None:
            return
        gradient = strategy.adapter.gradient
        projected = project(gradient, self.reference)
        if projected is not None:
            gradient.copy_(projected)
            self.projections += 1
        strategy.report(self.name, "projections", self.projections)

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:  # noqa: ARG002 - the callback's contract
        """The count belongs to the run that ends."""
        self.reference, self.projections = None, 0
