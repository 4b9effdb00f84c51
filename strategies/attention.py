"""Which attention a base is loaded with, and how a batch reaches it without padding.

On a GPU FlashAttention (Dao, arXiv:2307.08691) takes sequences of any lengths that lie one after other: their ends are
given once per forward pass, and no layer builds a mask or computes on padding. Where its package is not installed,
torch's SDPA takes padded batches of similar lengths, whose causal kernel needs no mask either. CPUs have an engine of
their own for most bases (`strategies.llama`). What needs a GPU is tested here by its contract, not run.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_flash_attn_2_available

FLASH = "flash_attention_2"


def attention_for(device: torch.device, dtype: torch.dtype) -> str:
    """The name by which transformers knows the best attention for `device` and `dtype`."""
    if device.type == "cpu":
        # SDPA's fused kernel is 5.6x slower than explicit products in a bfloat16 backward pass on CPUs
        return "eager" if dtype == torch.bfloat16 else "sdpa"
    half = dtype in (torch.bfloat16, torch.float16)
    return FLASH if half and is_flash_attn_2_available() else "sdpa"


def packed(decoder: Any, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """(sequences, length) padded token ids -> (sequences * length, hidden) last hidden states, 0 at padding.

    The decoder gets one row of all real tokens with positions that begin anew with every sequence.
    """
    real = real_places(tokens.shape, lengths).to(tokens.device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(tokens.device)
    states = decoder(
        input_ids=tokens.flatten()[real][None], position_ids=positions[None], use_cache=False,
        **boundaries(lengths, tokens.device),
    ).last_hidden_state[0]  # fmt: skip
    return states.new_zeros(tokens.numel(), states.shape[1]).index_copy(0, real, states)


def real_places(shape: torch.Size, lengths: Sequence[int]) -> Tensor:
    """(tokens,) flat places of the real tokens of a padded batch."""
    return torch.cat([torch.arange(length) + row * shape[1] for row, length in enumerate(lengths)])


def boundaries(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What FlashAttention's kernel for sequences of any lengths asks for, in transformers' names."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return {
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip
