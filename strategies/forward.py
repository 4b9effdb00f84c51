"""What a model says about tokenised rows: losses, log-probabilities, divergences. No weights change here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.adapter import Adapter
from strategies.dataset import Item, MicroBatch, micro_batches
from strategies.token_loss import CHUNK_ROWS, row_losses, sum_by_owner

FORWARD_TOKENS = 4096
"""Tokens per forward pass where no gradient is kept."""


class TopRows(NamedTuple):
    """The most likely tokens at the label rows of one item; `strategies.learner.TopLogProbabilities`."""

    tokens: Tensor
    """(label rows, K) int64"""
    logprobs: Tensor
    """(label rows, K) float32"""


def label_states(adapter: Adapter, micro: MicroBatch) -> Tensor:
    """(label rows, hidden) hidden states that predict the labels."""
    return adapter.hidden(micro.tokens, micro.mask.sum(1).tolist())[micro.rows.to(adapter.device)]


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS))


def sequence_logprobs(adapter: Adapter, micro: MicroBatch) -> Tensor:
    """(items, 2) summed log-probabilities of completion and rejected completion (0 without one); differentiable."""
    losses = row_losses(label_states(adapter, micro), adapter.head, micro.targets.to(adapter.device))
    sums = -sum_by_owner(losses, micro.owner.to(adapter.device), len(micro.tokens))
    items = len(micro.items)
    rejecting = torch.tensor([item.rejected is not None for item in micro.items], dtype=torch.bool, device=sums.device)
    rejected = torch.zeros(items, device=sums.device).masked_scatter(rejecting, sums[items:])
    return torch.stack([sums[:items], rejected], dim=1)


def token_losses(adapter: Adapter, items: Sequence[Item], tokens: int = FORWARD_TOKENS) -> Tensor:
    """(items,) float64: each item's mean NLL per completion token, in nats.

    What was found under these very weights before is not computed again (early stopping and the evaluation after it ask
    the same), unless another cut of the passes is asked for.
    """
    known = adapter.losses if tokens == FORWARD_TOKENS else {}
    missing = [item for item in items if item not in known]
    known |= zip(missing, _token_losses(adapter, missing, tokens).tolist(), strict=True)
    return torch.tensor([known[item] for item in items], dtype=torch.float64)


@torch.no_grad()
def _token_losses(adapter: Adapter, items: Sequence[Item], tokens: int) -> Tensor:
    losses = torch.zeros(len(items), dtype=torch.float64)
    place = {item: index for index, item in enumerate(items)}
    for micro in adapter.backend.passes([item for item in items if item.label_tokens], tokens):
        logprobs = sequence_logprobs(adapter, micro)[:, 0].double().cpu()
        for item, logprob in zip(micro.items, logprobs.tolist(), strict=True):
            losses[place[item]] = -logprob / item.label_tokens
    return adapter.backend.sum(losses)


@torch.no_grad()
def completion_logprobs(adapter: Adapter, items: Sequence[Item], tokens: int = FORWARD_TOKENS) -> dict[Item, Tensor]:
    """(2,) summed log-probabilities of completion and rejected completion, by item."""
    found = torch.zeros(len(items), 2, device=adapter.device)
    place = {item: index for index, item in enumerate(items)}
    for micro in adapter.backend.passes(items, tokens):
        found[[place[item] for item in micro.items]] = sequence_logprobs(adapter, micro)
    return dict(zip(items, adapter.backend.sum(found), strict=True))


@torch.no_grad()
def top_rows(adapter: Adapter, items: Sequence[Item], top: int, tokens: int = FORWARD_TOKENS) -> list[TopRows]:
    """The `top` most likely tokens at every label row, in the order of `items`; each process asks about all."""
    found: dict[Item, TopRows] = {}
    for micro in micro_batches(items, tokens):
        hidden = label_states(adapter, micro)
        best = [adapter.head.logits(hidden[rows]).log_softmax(-1).topk(top) for rows in _chunks(len(hidden))]
        indices, values = torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])
        for place, item in enumerate(micro.items):
            own = micro.owner == place
            found[item] = TopRows(indices[own], values[own])
    return [found[item] for item in items]


def divergence(
    adapter: Adapter, items: Sequence[Item], teacher: AbstractContextManager[None], tokens: int = FORWARD_TOKENS
) -> Tensor:
    """(items,) float64: mean over label rows of KL(teacher || adapter), exact over the vocabulary, in nats.

    `teacher`: a context, entered once, within which `adapter` answers as the teacher.
    """
    with teacher:
        taught = states(adapter, items, tokens)
    return divergences(adapter, items, taught, states(adapter, items, tokens))


@torch.no_grad()
def states(adapter: Adapter, items: Sequence[Item], tokens: int = FORWARD_TOKENS) -> dict[Item, Tensor]:
    """(label rows, hidden) of every item, under the present weights; of several processes each has its part."""
    found: dict[Item, Tensor] = {}
    for micro in adapter.backend.passes(items, tokens):
        rows = [item.label_tokens for item in micro.items]
        hidden = label_states(adapter, micro)
        found |= zip(micro.items, hidden[: sum(rows)].split(rows), strict=True)
    return found


@torch.no_grad()
def learn_losses(adapter: Adapter, items: Sequence[Item], known: Mapping[Item, Tensor]) -> None:
    """Remember the losses that follow from label states which are there anyway: no pass for them any more.

    `known`: of all `items`, or of this process's part of them.
    """
    losses = torch.zeros(len(items), dtype=torch.float64)
    here = [place for place, item in enumerate(items) if item in known and item.label_tokens]
    if here:
        hidden = torch.cat([known[items[place]] for place in here])
        targets = torch.tensor([token for place in here for token in items[place].tokens[items[place].start :]])
        rows = row_losses(hidden, adapter.head, targets.to(hidden.device)).double().cpu()
        losses[here] = torch.stack([part.mean() for part in rows.split([items[place].label_tokens for place in here])])
    adapter.losses.update(zip(items, adapter.backend.sum(losses).tolist(), strict=True))


@torch.no_grad()
def divergences(
    adapter: Adapter, items: Sequence[Item], teacher: Mapping[Item, Tensor], own: Mapping[Item, Tensor]
) -> Tensor:
    """(items,) float64: mean over label rows of KL(teacher || own), exact over the vocabulary, in nats."""
    means = torch.zeros(len(items), dtype=torch.float64)
    here = [place for place, item in enumerate(items) if item in own]
    if here:
        taught, said = (torch.cat([known[items[place]] for place in here]) for known in (teacher, own))
        rows = torch.cat([_kl(adapter, taught[part], said[part]) for part in _chunks(len(said))]).double().cpu()
        means[here] = torch.stack([part.mean() for part in rows.split([items[place].label_tokens for place in here])])
    return adapter.backend.sum(means)


def _kl(adapter: Adapter, teacher: Tensor, student: Tensor) -> Tensor:
    """(rows,) KL between the distributions of two (rows, hidden) states."""
    p, q = adapter.head.logits(teacher).log_softmax(-1), adapter.head.logits(student).log_softmax(-1)
    # in place: a chunk's float32 logits are 50 MB of fresh memory each time
    return q.neg_().add_(p).mul_(p.exp_()).sum(-1)
