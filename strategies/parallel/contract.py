"""What the training loop asks of the processes that share its work.

Every process holds the whole adapter (the flat vector, its gradient, the states of the methods: small beside the base)
and takes the same decisions in the same order; what is divided is the batch, and the frozen base where a backend shards
it. One optimiser step over a batch of items I on processes p = 1..P:

    g = sum_p sum_{i in I_p} g_i / denominator(I)          g: (parameters,)

The denominators are those of the whole batch, so `sum` of the processes' parts is the gradient of one process, for any
P. Methods act on g after that (EWC's pull, GEM's and A-GEM's projections), hence on equal vectors in every process.
The same holds for Fisher information, hold-out losses and early stopping: parts are summed, never averaged.

Rules for whoever writes a backend or calls one:

- `sum`, `any`, `step`, `moments`, `wait` are collective: all processes call them in the same order;
- where `is_sharded`, every forward and backward pass is collective too: all processes must do equally many, which
  `passes` sees to with empty micro-batches (no items, no label rows, a gradient of zero);
- only the process with `rank` 0 writes files.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.dataset import Item, MicroBatch
from strategies.request import Training


class Shared(Protocol):
    """The adapter as a backend sees it (`strategies.adapter.Adapter`)."""

    decoder: Any
    """Called by `hidden`; a backend may put a module in its place that is called alike."""
    flat: Tensor
    """(parameters,) float32, the same on every process"""
    gradient: Tensor
    """(parameters,) float32"""
    parameter: nn.Parameter
    """The same storage as `flat`; its `grad` is `gradient`."""

    def refresh(self) -> None:
        """Take `flat` over into the working copy."""

    def call_layers(self) -> None:
        """Compute by calling the decoder's layers, so that hooks on them can gather their weights."""


class Backend(Protocol):
    """One process's view of the processes of a run."""

    name: str
    rank: int
    """Of this process, from 0."""
    size: int
    is_sharded: bool
    """Whether the base's weights are divided among the processes, so that forward passes are collective."""

    def setup(self, adapter: Shared) -> None:
        """Take over the loaded model: shard the base. Before any forward pass."""

    def passes(self, items: Sequence[Item], tokens: int, *, alone: bool = False) -> list[MicroBatch]:
        """This process's forward passes over its part of a batch, at most `tokens` each.

        `alone`: every item is a batch of its own, in a pass of its own.
        """

    def backward(self, loss: Tensor) -> None:
        """Add this process's part to `adapter.gradient`."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""

    def any(self, *flags: bool) -> list[bool]:
        """Each flag: whether any process has raised it."""

    def optimizer(self, training: Training) -> Optimizer:
        """AdamW over the adapter's parameter; its `param_groups[0]["lr"]` is set before every step."""

    def step(self) -> None:
        """Let the optimiser act: `adapter.gradient`, the same on every process, to `adapter.flat`."""

    def moments(self) -> dict[str, Tensor]:
        """AdamW's `exp_avg`, `exp_avg_sq` (parameters,) and `step` (), whole; empty before the first step."""

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `moments`."""

    def wait(self) -> None:
        """Until every process is here."""

    def close(self) -> None:
        """Leave the group."""
