"""Freezing of the bottom layers: what lies low in the model stays as it is, and the backward pass ends above it.

Lower layers carry what texts have in common, upper ones what tells tasks apart (Yosinski et al., arXiv:1411.1792; Lee
et al., arXiv:2210.11466), so an update may leave the lower ones alone. Their LoRA parameters get no gradient and are
kept from the optimiser's weight decay; as none of them needs a gradient, autograd does not descend below the lowest
trained layer.
"""

import re
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from strategies import catalog
from strategies.failure import Failure
from strategies.learner import Learner, Loop, Parameters

LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
"""A decoder layer's number in a module's name, as the model families of transformers write it."""


def layer_of(name: str) -> int | None:
    """The decoder layer that a parameter belongs to; None outside of them."""
    found = LAYER.search(name)
    return int(found.group(1)) if found else None


def leaves_below(adapter: Parameters, share: float) -> list[nn.Parameter]:
    """LoRA parameters of the bottom `share` of the layers, rounded down; raises `Failure` without any layer."""
    numbered = [(layer_of(name), leaf) for name, leaf in adapter.model.named_parameters() if "lora_" in name]
    layers = sorted({number for number, _ in numbered if number is not None})
    if not layers:
        raise Failure(
            "bad_strategy", "freeze: the base model's LoRA layers are not numbered (.layers.N.); remove this strategy"
        )
    limit = layers[int(len(layers) * share)]
    return [leaf for number, leaf in numbered if number is not None and number < limit]


class Still:
    """Parts of the adapter that must not move: pairs of views into the weights and into their gradient."""

    def __init__(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.parts = [(weights, weights.clone(), gradient) for weights, gradient in parts]

    def clear(self) -> None:
        """No gradient for them, whatever other methods have added."""
        for _, _, gradient in self.parts:
            gradient.zero_()

    def restore(self, adapter: Parameters) -> None:
        """Undo what an optimiser does without a gradient: weight decay, momentum that was kept."""
        for weights, kept, _ in self.parts:
            weights.copy_(kept)
        adapter.refresh()

    @property
    def parameters(self) -> int:
        """How many they are."""
        return sum(kept.numel() for _, kept, _ in self.parts)


class Freezing(Learner, supports_distributed=True):
    """Keeps the bottom layers' adapter as the parent version has it. Nothing persists."""

    name = "freeze"

    def __init__(self, parameters: catalog.Freeze) -> None:
        super().__init__()
        self.parameters = parameters
        self.leaves: list[nn.Parameter] = []
        self.still = Still([])

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """From here on these parameters ask for no gradient, and what they are is remembered."""
        self.leaves = leaves_below(strategy.adapter, self.parameters.share)
        for leaf in self.leaves:
            leaf.requires_grad_(False)
        self.still = Still((leaf.detach(), cast(Tensor, leaf.grad)) for leaf in self.leaves)
        strategy.report(self.name, "parameters", self.still.parameters)

    def after_backward(self, strategy: Loop, *_: Any, **__: Any) -> None:  # noqa: ARG002 - the callback's contract
        """Take away what other methods added."""
        self.still.clear()

    def after_training_iteration(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Take back what the optimiser did."""
        self.still.restore(strategy.adapter)

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:  # noqa: ARG002 - the callback's contract
        """The next run decides for itself."""
        for leaf in self.leaves:
            leaf.requires_grad_(True)
