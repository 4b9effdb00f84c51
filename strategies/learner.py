"""The contract between the training loop and a method of continual learning.

A method (EWC, GEM, distillation, ...) is a `Learner`: an ordinary Avalanche plugin plus what persists between updates
and an optional loss term on the label rows. It sees the loop through `Loop`, never through the template's class.

What happens in one run, in this order (each is an Avalanche callback unless marked with *):

1. `load_state`* with what `state` gave at the end of the parent version (not called for a first update);
2. `before_training_exp`: the adapter holds the parent's weights; also after a resume;
3. only when a run is resumed: `load_state`* once more, with what `state` gave at the checkpoint;
4. per optimiser step `before_training_iteration`; per micro-batch `row_term`*; after all micro-batches
   `after_backward`: `loop.adapter.gradient` is the gradient of the whole batch and may be changed in place; then
   clipping and AdamW; `after_training_iteration`;
5. `after_training_exp`: the adapter holds the best weights, as they will be saved: the place for Fisher and anchors;
6. `state`*; it is also called for every checkpoint, between two steps.

Avalanche's `before_update` and `after_update` are what happens around an optimiser step; an "update" in this project is
the whole run.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from buffers.experience import Role
from strategies.dataset import Item, MicroBatch
from strategies.lean_avalanche import SupervisedPlugin

Teacher = Literal["base", "previous", "current"]
JsonNotes = dict[str, Any]


class Parameters(Protocol):
    """The adapter as a method sees it: one flat vector and its gradient, both float32."""

    flat: Tensor
    """(parameters,): every LoRA parameter is a view of it; assign with `copy_` only."""
    gradient: Tensor
    """(parameters,): the accumulated gradient of the current optimiser step; change it in place."""
    model: Any
    """peft's model; the leaves of its LoRA layers and their `grad` are views of `flat` and `gradient`."""

    def refresh(self) -> None:
        """Call after every change of `flat`: the forward pass may read a copy in the compute precision."""


class TopLogProbabilities(Protocol):
    """A teacher's K most likely tokens at every label row of one item."""

    @property
    def tokens(self) -> Tensor:
        """(label rows, K) int64"""

    @property
    def logprobs(self) -> Tensor:
        """(label rows, K) float32, normalised over the whole vocabulary (the rest is 1 - sum exp)"""


class Loop(Protocol):
    """What the loop offers to a method (`strategies.template.Template`)."""

    adapter: Parameters
    items: Mapping[Role, Sequence[Item]]
    """All tokenised rows of the experience by role; missing roles are empty."""
    update: int
    """Number of this update, from 1."""
    step: int
    """Optimiser steps done so far in this run; `steps` are planned."""
    steps: int
    step_items: Sequence[Item]
    """The items of the current optimiser batch."""
    mbatch: MicroBatch
    """Between `before_forward` and `after_forward`: what the forward pass is on."""
    generator: torch.Generator
    """Seeded source of all draws; part of every checkpoint."""

    def gradient_of(self, items: Sequence[Item], term: "RowTerm | None" = None) -> Tensor:
        """(parameters,) gradient of the mean token loss on `items` at the current weights, without dropout.

        With a `term`: of that term summed over their label rows instead of the loss.
        Leaves the accumulated gradient and every random state as they were.
        """

    def per_example_squared_gradients(self, items: Sequence[Item]) -> Tensor:
        """(parameters,) mean over `items` of the squared gradient of each item's own mean token loss."""

    def teacher_top(self, items: Sequence[Item], teacher: Teacher, top: int) -> list[TopLogProbabilities]:
        """The teacher's `top` most likely tokens at the label rows, in the order of `items`, without dropout.

        `base`: the base model without adapter; `previous`: the weights that the run started from; `current`: the
        weights as they are now.
        """

    def report(self, name: str, key: str, value: float) -> None:
        """Record `RunReport.strategies[name][key] = value`; the last value stays."""


class RowTerm(Protocol):
    """An extra loss on the logits of a micro-batch's label rows; the loop calls it on chunks of them."""

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """The sum of the term over `rows`, a scalar that carries its own weight and denominator.

        logits: (rows, vocabulary) float32, differentiable, never kept; rows: which of `micro.rows` these are. A term
        averaged over the optimiser batch divides by `micro.batch_label_tokens`.
        """


class PreferenceLoss(Protocol):
    """The loss of a preference shape (`comparison`, `boolean`), chosen by a row's shape."""

    def __call__(self, policy: Tensor, reference: Tensor, items: Sequence[Item]) -> Tensor:
        """(items,) losses, differentiable in `policy`.

        policy, reference: (items, 2) summed log-probabilities of completion and rejected completion (0 for `boolean`)
        under the weights now and under the weights that the run started from.
        """


class Learner(SupervisedPlugin[Any], supports_distributed=True):
    """One method of continual learning; override what it needs."""

    name: str
    """Names its state files and its part of the report."""

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:
        """Take over what `state` returned: at the end of the parent version, or at a checkpoint."""

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """What must survive: tensors (saved as `strategy/NAME.safetensors`) and JSON values (`strategy/NAME.json`)."""
        return {}, {}

    def row_term(self, loop: Loop, micro: MicroBatch) -> RowTerm | None:  # noqa: ARG002 - for overriding
        """An extra loss term for this micro-batch, or None."""
        return None
