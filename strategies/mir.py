"""Maximally interfered retrieval: a step replays what the step itself would damage most.

Aljundi et al., arXiv:1908.04742, after Avalanche's `MIRPlugin`:

    g: gradient of the step's new rows;  theta_v = theta - |step| g / |g|
    replayed are the k of C drawn candidates with the largest  loss(theta_v) - loss(theta)

Avalanche's own copies the model for every virtual step and stacks classifier batches; here the virtual step is taken on
the adapter's flat vector, and the chosen rows stand in the place of those that `replay` would have shown, so that the
exact ratio stays. |step| = learning rate x sqrt(parameters), the length of a step of AdamW, where the paper has plain
gradient descent: that one, a thousand times shorter, moves losses by less than bfloat16 can tell.
"""

import math
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.dataset import Item
from strategies.evaluate import has_token_loss
from strategies.forward import token_losses
from strategies.learner import Learner


class InterferedRetrieval(Learner, supports_distributed=True):
    """Exchanges the replayed rows of every step. Nothing persists: what interferes is asked anew each time."""

    name = "avalanche-MIRPlugin"

    def __init__(self, parameters: catalog.Avalanche) -> None:
        super().__init__()
        self.subsample = int(parameters.parameters.get("subsample", catalog.MIR_SUBSAMPLE))
        self.memory: list[Item] = []
        self.replaced = 0

    def before_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The memory is what the experience brings to replay: as many rows as all epochs together could show."""
        self.memory = [item for item in strategy.items["replay"] if has_token_loss(item)]
        self.replaced = 0

    def before_training_iteration(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Put the most interfered candidates in the place of the step's replayed rows."""
        places = [place for place, item in enumerate(strategy.step_items) if item.role == "replay"]
        new = [item for item in strategy.step_items if item.role == "new" and has_token_loss(item)]
        if not places or not new or len(self.memory) <= len(places):
            return
        drawn = torch.randperm(len(self.memory), generator=strategy.generator)[: max(self.subsample, len(places))]
        candidates = [self.memory[place] for place in drawn.tolist()]
        rise = self._rise(strategy, new, candidates)
        chosen = rise.topk(len(places)).indices.tolist()
        strategy.report(self.name, "rise", float(rise[chosen].mean()))
        strategy.report(self.name, "rise_of_all", float(rise.mean()))
        for place, index in zip(places, chosen, strict=True):
            self.replaced += strategy.step_items[place] is not candidates[index]
            strategy.step_items[place] = candidates[index]
        strategy.report(self.name, "replaced", self.replaced)

    def _rise(self, strategy: Any, new: list[Item], candidates: list[Item]) -> Tensor:
        """(candidates,) nats per token that a step on `new` alone would cost each of them."""
        adapter = strategy.adapter
        gradient = strategy.gradient_of(new)
        length = strategy.training.learning_rate * math.sqrt(gradient.numel())
        with adapter.without_dropout():
            before = token_losses(adapter, candidates)
            with adapter.holding(adapter.flat - gradient * (length / gradient.norm().clamp_min(1e-12))):
                return token_losses(adapter, candidates) - before
