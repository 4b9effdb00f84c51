"""Sequences that begin alike are computed once as far as they do: a chat template's system prompt, a quest's setting.

A causal model's states of a prefix do not depend on what follows, so the sequences of one pass share them, and their
keys and values with them: of the 48 tokens of a short chat turn in SmolLM2's template 30 are the system prompt. Back
through them goes the sum of what the sequences ask for: the gradient of the padded batch. With dropout they share a
mask there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SAVED_SHARE = 0.2
"""Of the tokens: for less the detour does not pay."""


class Prefix(NamedTuple):
    """How the tokens of a pass are laid out: the common beginning once, then every sequence's own rest."""

    length: int
    rests: list[int]
    """Tokens of each sequence after the common beginning; at least 1."""
    chosen: Tensor
    """(computed tokens,) which of all tokens are computed"""
    places: Tensor
    """(tokens,) which of the computed ones each token is"""
    positions: Tensor
    """(computed tokens,) from 0 in every sequence"""


def common_prefix(tokens: Tensor, lengths: Sequence[int]) -> Prefix | None:
    """What the sequences of `tokens` (tokens,) have in common, if it is worth while."""
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    shortest = min(lengths, default=0) - 1  # each sequence keeps a token of its own
    if len(lengths) < 2 or shortest < 1:
        return None
    heads = torch.stack([tokens[start : start + shortest] for start in starts])
    differs = (heads != heads[0]).any(0).nonzero()
    length = int(differs[0]) if len(differs) else shortest
    if length * (len(lengths) - 1) < SAVED_SHARE * sum(lengths):
        return None
    rests = [size - length for size in lengths]
    chosen = [torch.arange(length)] + [
        torch.arange(start + length, start + size) for start, size in zip(starts, lengths, strict=True)
    ]
    places, done = [], length
    for rest in rests:
        places += [torch.arange(length), torch.arange(done, done + rest)]
        done += rest
    positions = [torch.arange(length)] + [torch.arange(length, size) for size in lengths]
    return Prefix(length, rests, torch.cat(chosen), torch.cat(places), torch.cat(positions))
