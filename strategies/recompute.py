"""Less memory for more work where a base's own layers are called: of a layer only its input is kept.

Activation checkpointing (Chen et al., arXiv:1604.06174) by torch's own `checkpoint`. The hand-written pass does it for
itself (`strategies.llama`). What is computed again sees the dropout masks of its forward pass: the same gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strategies.lora_linear import LoraState


def recompute_on_demand(layer: nn.Module, state: LoraState) -> None:
    """From now on `layer` keeps only its input for the backward pass, whenever `state.recomputes`."""
    whole = layer.forward

    def forward(*given: Any, **named: Any) -> Any:
        if not state.recomputes or not torch.is_grad_enabled():
            return whole(*given, **named)
        masks = state.masks

        def again(*inputs: Tensor) -> Any:
            present, state.masks = state.masks, masks  # the pass is over when this is called the second time
            try:
                return whole(*inputs, **named)
            finally:
                state.masks = present

        return checkpoint(again, *given, use_reentrant=False, preserve_rng_state=False)

    layer.forward = forward
