"""Attention of the hand-written pass (`strategies.llama`): explicit products per run of sequences, forward and back.

Per key/value head over its group's queries, so that no keys are repeated; the causal mask is added in the product.
Shapes: q: (sequences * kv heads, group * length, head size); k, v: (sequences * kv heads, length, head size); scores:
(sequences * kv heads, group * length, length). Where sequences have a beginning in common (`strategies.prefix`), it is
the first run, and its keys and values stand before those of all others.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.prefix import Prefix


class Attended(NamedTuple):
    """What attention's backward pass reads, for one run of sequences."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    """softmax of the scores"""


class Rotation(NamedTuple):
    """Rotary positions (Su et al., arXiv:2104.09864); (tokens, 1, head size / 2) each."""

    cosine: Tensor
    sine: Tensor


class Run(NamedTuple):
    """Sequences of one length that lie one after other."""

    rows: slice
    sequences: int
    length: int
    mask: Tensor
    """(1, group * length, length) causal; to the right of what is seen of a common beginning"""
    follows: bool = False
    """Whether the sequences continue what the first run is."""


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """The sizes of a decoder's heads, and what is computed with them."""

    heads: int
    kv_heads: int
    head_size: int
    scaling: float

    def layout(self, lengths: Sequence[int], dtype: torch.dtype, shared: Prefix | None) -> list[Run]:
        """Neighbouring sequences of one length attend in one product."""
        runs: list[Run] = []
        group = self.heads // self.kv_heads
        start = before = 0
        if shared is not None:
            start = before = shared.length
            runs.append(Run(slice(0, start), 1, start, _causal_mask(start, group, dtype)))
        for length, same in itertools.groupby(lengths if shared is None else shared.rests):
            sequences = len(list(same))
            rows = slice(start, start + sequences * length)
            mask = torch.nn.functional.pad(_causal_mask(length, group, dtype), (before, 0))
            runs.append(Run(rows, sequences, length, mask, before > 0))
            start = rows.stop
        return runs

    def forward(self, qkv: Tensor, runs: Sequence[Run], rotation: Rotation) -> tuple[Tensor, list[Attended]]:
        """qkv: (tokens, (heads + 2 kv heads) * head size)"""
        heads = qkv.view(len(qkv), -1, self.head_size)
        rotated = torch.empty_like(heads[:, : -self.kv_heads])
        _rotate(heads[:, : -self.kv_heads], rotation, rotated)
        mixed = qkv.new_empty(len(qkv), self.heads, self.head_size)
        kept: list[Attended] = []
        for run in runs:
            q = self._gather(rotated[run.rows, : self.heads], run)
            k = self._gather(rotated[run.rows, self.heads :], run)
            v = self._gather(heads[run.rows, -self.kv_heads :], run)
            if run.follows:  # the first run, alone, is what all of them begin with
                k, v = _behind(kept[0].k, k, run), _behind(kept[0].v, v, run)
            scores = torch.baddbmm(run.mask.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=self.scaling)
            weights = torch.softmax(scores, dim=-1)
            self._scatter(weights @ v, mixed[run.rows], run)
            kept.append(Attended(q, k, v, weights))
        return mixed.flatten(1), kept

    def backward(self, dmixed: Tensor, kept: Sequence[Attended], runs: Sequence[Run], rotation: Rotation) -> Tensor:
        """(tokens, heads * head size) -> the gradient of qkv"""
        dheads = dmixed.new_empty(len(dmixed), self.heads + 2 * self.kv_heads, self.head_size)
        drotated = torch.empty_like(dheads[:, : -self.kv_heads])
        split = dmixed.view(len(dmixed), self.heads, self.head_size)
        for run, (q, k, v, weights) in zip(runs, kept, strict=True):
            do = self._gather(split[run.rows], run)
            dweights = do @ v.transpose(1, 2)
            dscores = torch._softmax_backward_data(dweights, weights, -1, do.dtype).mul_(self.scaling)
            self._scatter(dscores @ k, drotated[run.rows, : self.heads], run)
            before = k.shape[1] - run.length  # of a common beginning
            dk, dv = dscores.transpose(1, 2) @ q, weights.transpose(1, 2) @ do
            self._scatter(dk[:, before:], drotated[run.rows, self.heads :], run)
            self._scatter(dv[:, before:], dheads[run.rows, -self.kv_heads :], run)
            if before:
                drotated[:before, self.heads :] += self._of_all(dk[:, :before], run)
                dheads[:before, -self.kv_heads :] += self._of_all(dv[:, :before], run)
        _rotate(drotated, rotation, dheads[:, : -self.kv_heads], sign=-1)
        return dheads.flatten(1)

    def _gather(self, heads: Tensor, run: Run) -> Tensor:
        """(rows, any heads, head size) -> (sequences * kv heads, group * length, head size)"""
        split = heads.unflatten(0, (run.sequences, run.length)).unflatten(2, (self.kv_heads, -1))
        return split.permute(0, 2, 3, 1, 4).reshape(run.sequences * self.kv_heads, -1, self.head_size)

    def _of_all(self, values: Tensor, run: Run) -> Tensor:
        """(sequences * kv heads, length, head size) -> (length, kv heads, head size), summed over the sequences"""
        return values.unflatten(0, (run.sequences, self.kv_heads)).sum(0).transpose(0, 1)

    def _scatter(self, values: Tensor, heads: Tensor, run: Run) -> None:
        """The inverse of `_gather`, into `heads`."""
        split = values.view(run.sequences, self.kv_heads, -1, run.length, self.head_size).permute(0, 3, 1, 2, 4)
        heads.view(run.sequences, run.length, self.kv_heads, -1, self.head_size).copy_(split)


def _behind(first: Tensor, own: Tensor, run: Run) -> Tensor:
    """Keys or values of a common beginning (kv heads, length, head size) before those of each sequence."""
    return torch.cat([first.repeat(run.sequences, 1, 1), own], dim=1)


def _causal_mask(length: int, group: int, dtype: torch.dtype) -> Tensor:
    """(1, group * length, length): 0 where a query may look, -inf beyond; the group's queries one after other."""
    mask = torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)
    return mask.repeat(group, 1)[None]


def _rotate(heads: Tensor, rotation: Rotation, out: Tensor, sign: int = 1) -> None:
    """Rotate (tokens, heads, head size) by position into `out`; sign -1 is the inverse, which is the transpose."""
    first, second = heads.chunk(2, dim=-1)
    to_first, to_second = out.chunk(2, dim=-1)
    torch.mul(first, rotation.cosine, out=to_first)
    to_first.addcmul_(second, rotation.sine, value=-sign)
    torch.mul(second, rotation.cosine, out=to_second)
    to_second.addcmul_(first, rotation.sine, value=sign)
