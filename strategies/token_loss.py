"""Cross-entropy on label rows only, in chunks: logits of (tokens x vocabulary) never exist.

For SmolLM2 (49,152 tokens) the logits of 2,048 rows are 400 MB in float32; of 256 rows 50 MB. The gradient with respect
to the hidden states is computed chunk by chunk in the forward pass, while a chunk's logits are there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 256

RowTermOfChunk = Callable[[Tensor, slice], Tensor]
"""An extra loss on a chunk's logits (see `strategies.learner.RowTerm`)."""


class Head(NamedTuple):
    """The output layer: logits = scale * hidden W^T, then softly capped if `cap` > 0."""

    weight: Tensor
    """(vocabulary, hidden)"""
    scale: float = 1.0
    cap: float = 0.0

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocabulary) in float32."""
        logits = (hidden @ self.weight.T).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


class _TokenLoss(torch.autograd.Function):
    """sum over rows of weight * NLL, plus the row terms; gradient for the hidden rows only (the head is frozen)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, weight: float | Tensor, terms: list[RowTermOfChunk]
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        extra = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            chunk = _plain_chunk if not terms and not head.cap and head.scale == 1.0 else _general_chunk
            share = weight[rows] if isinstance(weight, Tensor) else weight
            losses[rows], gradient[rows], value = chunk(hidden[rows], head, targets[rows], share, terms, rows)
            extra += value
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * weight).sum() + extra, losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None


def _plain_chunk(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    weight: float | Tensor,
    terms: list[RowTermOfChunk],  # noqa: ARG001 - as `_general_chunk`
    rows: slice,  # noqa: ARG001
) -> tuple[Tensor, Tensor, float]:
    """Closed form: d NLL / d logits = softmax - onehot; two passes over the logits beside the two products."""
    logprobs = torch.log_softmax(hidden @ head.weight.T, dim=-1, dtype=torch.float32)
    picked = targets[:, None]
    losses = -logprobs.gather(1, picked).squeeze(1)
    delta = logprobs.exp_()
    delta.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=delta.dtype))
    by_row = weight[:, None].to(hidden.dtype) if isinstance(weight, Tensor) else weight
    return losses, (delta.to(hidden.dtype) @ head.weight).mul_(by_row), 0.0


def _general_chunk(
    hidden: Tensor, head: Head, targets: Tensor, weight: float | Tensor, terms: list[RowTermOfChunk], rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = head.logits(leaf)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        extra = torch.stack([torch.zeros((), device=logits.device), *(term(logits, rows) for term in terms)]).sum()
        (gradient,) = torch.autograd.grad((losses * weight).sum() + extra, leaf)
    return losses.detach(), gradient, extra.detach()


def token_loss(
    hidden: Tensor, head: Head, targets: Tensor, weight: float | Tensor, terms: list[RowTermOfChunk] | None = None
) -> tuple[Tensor, Tensor]:
    """(sum of weight * NLL + row terms, differentiable in hidden; NLL of every row, not differentiable).

    hidden: (rows, hidden)  targets: (rows,) int64  weight: one for all rows, or (rows,)
    """
    return _TokenLoss.apply(hidden, head, targets, weight, terms or [])


def row_losses(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """(rows,) NLL in nats, differentiable; chunks are recomputed in the backward pass."""
    parts = [
        checkpoint(
            _cross_entropy, hidden[start : start + CHUNK_ROWS], head, targets[start : start + CHUNK_ROWS],
            use_reentrant=False,
        )
        for start in range(0, len(hidden), CHUNK_ROWS)
    ]  # fmt: skip
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(head.logits(hidden), targets, reduction="none")


def sum_by_owner(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    """(owners,) sums of (rows,) values by the sequence that a row belongs to."""
    return torch.zeros(owners, dtype=values.dtype, device=values.device).index_add(0, owner, values)
