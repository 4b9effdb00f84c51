"""One process alone; what the other backends have in common with it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from strategies.dataset import Item, MicroBatch, empty_micro_batch, micro_batches
from strategies.parallel.contract import Shared
from strategies.request import Training

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Single:
    """One process: nothing is shared, nothing is sent. Implements `strategies.parallel.contract.Backend`."""

    name = "single"
    rank, size, is_sharded = 0, 1, False
    _adapter: Shared
    _optimizer: Optimizer

    def setup(self, adapter: Shared) -> None:
        """Nothing to take over but the adapter."""
        self._adapter = adapter

    def passes(self, items: Sequence[Item], tokens: int, *, alone: bool = False) -> list[MicroBatch]:
        """This process's micro-batches; empty ones where it has nothing to do and others may have."""
        own = self._part(items, tokens, alone, self.rank)
        if self.size == 1:
            return own
        needed = 1
        if self.is_sharded:
            needed = max(1, *(len(self._part(items, tokens, alone, rank)) for rank in range(self.size)))
        return own + [empty_micro_batch()] * (needed - len(own))

    def _part(self, items: Sequence[Item], tokens: int, alone: bool, rank: int) -> list[MicroBatch]:
        if alone:
            return [micro for item in items[rank :: self.size] for micro in micro_batches([item], tokens)]
        return micro_batches(items, tokens, part=(rank, self.size))

    def backward(self, loss: Tensor) -> None:
        """The LoRA layers add to the flat gradient themselves."""
        loss.backward()

    def sum(self, tensor: Tensor) -> Tensor:
        """One process has it all."""
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Each flag: whether any process has raised it."""
        if self.size == 1:
            return list(flags)
        return [bool(count) for count in self.sum(torch.tensor(flags, dtype=torch.int64)).tolist()]

    def optimizer(self, training: Training) -> Optimizer:
        """One fused kernel over the flat vector."""
        self._optimizer = AdamW(
            [self._adapter.parameter], lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        return self._optimizer

    def step(self) -> None:
        """AdamW."""
        self._optimizer.step()

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state, as it is."""
        state = self._optimizer.state.get(self._adapter.parameter, {})
        return {key: state[key] for key in MOMENTS if key in state}

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """On the parameter's device, but for the count of steps."""
        parameter = self._adapter.parameter
        kept = {key: tensors[key].to(parameter.device) for key in MOMENTS[:2]}
        self._optimizer.state[parameter] = {**kept, "step": tensors["step"]}

    def wait(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to leave."""
