"""Noise on the embeddings while training (NEFTune): a small set is learned with less memorising of its exact wording.

Jain et al., arXiv:2310.05914:   e <- e + U(-1, 1) alpha / sqrt(tokens x width)      e: (sequences, length, width)

`tokens` is the length of the sequence, without padding, and the noise is drawn anew in every forward pass of the
training loss; evaluations, teachers, Fisher information and reference gradients are computed without it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from strategies import catalog
from strategies.learner import Learner, Loop


def noise(embedded: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """The noise for `embedded` from the default generator. lengths: (sequences,) int64, their real tokens.

    embedded: (sequences, length, width) with padding, or (tokens, width), sequence after sequence without it.
    """
    size = alpha / (lengths.cpu() * embedded.shape[-1]).float().sqrt()
    per_row = size[:, None, None] if embedded.dim() == 3 else size.repeat_interleave(lengths.cpu())[:, None]
    uniform = torch.rand(embedded.shape, dtype=torch.float32).mul_(2).sub_(1)  # on the CPU: one stream on any device
    return (uniform * per_row).to(embedded.device, embedded.dtype)


class EmbeddingNoise(Learner, supports_distributed=True):
    """NEFTune. Nothing persists; the noise comes from torch's own generator, which checkpoints keep for dropout."""

    name = "augment"

    def __init__(self, parameters: catalog.Augment) -> None:
        super().__init__()
        self.parameters = parameters
        self._hook: Any = None

    def before_forward(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """From here until `after_forward` the embeddings are noisy."""
        lengths = strategy.mbatch.mask.sum(dim=1)

        def add(_: nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor:
            return embedded + noise(embedded, lengths, self.parameters.noise)

        self._hook = strategy.adapter.model.get_input_embeddings().register_forward_hook(add)

    def after_forward(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """No noise outside of the training loss."""
        self._hook.remove()
        strategy.report(self.name, "noise", self.parameters.noise)
