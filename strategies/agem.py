"""Averaged GEM: the gradient of a step may not raise the average loss on a random batch of memories.

Chaudhry et al., arXiv:1812.00420:  g~ = g - (g . g_ref / g_ref . g_ref) g_ref  if g . g_ref < 0, else g

    g, g_ref: (parameters,); g_ref: gradient of one batch drawn anew at each step from the memories of all past updates

One more forward and backward pass per step and one more vector, whatever the number of past updates. GEM's memory
strength gamma (see `strategies.gem`), which that paper leaves out, is put in: g + gamma g_ref is what is projected.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.ewc import drawn
from strategies.learner import JsonNotes, Learner, Loop


def project(g: Tensor, reference: Tensor, strength: float = 0.0) -> Tensor | None:
    """The closest gradient (parameters,) to g + strength x reference that does no harm to it; None: g is that."""
    harm = torch.dot(g, reference)
    square = torch.dot(reference, reference)
    if square == 0:
        return None
    needed = float(-harm / square)
    return g + max(needed, strength) * reference if max(needed, strength) > 0 else None


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
        """Add as much of the reference as the strength asks for, or more where less would raise the loss on it."""
        if self.reference is None:
            return
        gradient = strategy.adapter.gradient
        projected = project(gradient, self.reference, self.parameters.strength)
        if projected is not None:
            gradient.copy_(projected)
            self.projections += 1
        strategy.report(self.name, "projections", self.projections)

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:  # noqa: ARG002 - the callback's contract
        """The count belongs to the run that ends."""
        self.reference, self.projections = None, 0
