"""Learning without forgetting: the model is held to what a teacher says, by KL(teacher || model) at every label row.

Li & Hoiem, arXiv:1606.09282; temperature and its square from Hinton et al., arXiv:1503.02531:

    strength T^2 / N sum_rows sum_b p_b (log p_b - log q_b)      N: label tokens of the optimiser batch

    p, q: (rows, K + 1) teacher and model on the teacher's K most likely tokens and one bucket for the rest

The K + 1 buckets are a coarser distribution than the vocabulary, hence a lower bound of the full KL (exact for K = the
vocabulary); with T other than 1 both sides are p^(1/T) normalised over the buckets. The teacher is the base model
(adapter off) or the weights that the run started from, never trained: its answers are computed once per update.
Dividing by all label tokens of the batch makes every held row weigh the same, however few of them a batch has.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from buffers.experience import Role
from strategies import catalog
from strategies.dataset import Item, MicroBatch
from strategies.learner import Learner, Loop, RowTerm, TopLogProbabilities

SMALLEST_REST = 1e-7
"""Probability below which float32 cannot tell the rest bucket from nothing."""


def divergence(logits: Tensor, tokens: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
    """(rows,) T^2 KL(teacher || model) over the teacher's top tokens and the rest, in nats.

    logits: (rows, vocabulary) of the model; tokens: (rows, K) int64; logprobs: (rows, K), the teacher's.
    """
    p, q = _teacher_buckets(logprobs), _model_buckets(logits, tokens)
    if tokens.shape[-1] == logits.shape[-1]:  # the whole vocabulary: there is no rest
        p, q = p[:, :-1], q[:, :-1]
    p, q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def _teacher_buckets(logprobs: Tensor) -> Tensor:
    """(rows, K) -> (rows, K + 1): with the logarithm of the rest's probability."""
    rest = 1 - logprobs.double().exp().sum(-1, keepdim=True)
    return torch.cat([logprobs.float(), rest.clamp_min(SMALLEST_REST).log().float()], dim=-1)


def _model_buckets(logits: Tensor, tokens: Tensor) -> Tensor:
    """(rows, vocabulary) -> (rows, K + 1); the rest is summed over its tokens, as 1 - sum would lose its gradient."""
    total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, tokens), rest], dim=-1) - total


class HeldRows:
    """A `RowTerm`: the sum of weight x `divergence` over those label rows that have a teacher."""

    def __init__(
        self,
        micro: MicroBatch,
        teachers: Sequence[TopLogProbabilities | None],
        weights: Sequence[float],
        temperature: float = 1.0,
    ) -> None:
        """teachers, weights: one per item of `micro`; no teacher for the items that are not held."""
        known = [teacher for teacher in teachers if teacher is not None]
        self.tokens = torch.cat([teacher.tokens for teacher in known])  # (held rows, K)
        self.logprobs = torch.cat([teacher.logprobs for teacher in known])
        owner = micro.owner.to(self.tokens.device)
        self.held = torch.tensor([teacher is not None for teacher in teachers]).to(owner.device)[owner]  # (label rows,)
        self.place = self.held.cumsum(0) - 1  # label row -> its place among the held rows
        self.weights = torch.tensor(weights).to(owner.device)[owner][self.held]  # (held rows,)
        self.temperature = temperature
        if int(self.held.sum()) != len(self.tokens):
            raise ValueError(f"{int(self.held.sum())} label rows are held, their teacher has {len(self.tokens)}")

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """logits: (rows, vocabulary), those of `micro.rows[rows]`."""
        held = self.held[rows]
        place = self.place[rows][held]
        tokens = self.tokens[place].to(logits.device, torch.int64)
        logprobs = self.logprobs[place].to(logits.device, torch.float32)
        values = divergence(logits[held.to(logits.device)], tokens, logprobs, self.temperature)
        return (self.weights[place].to(values.device) * values).sum()


def anchored(general: list[Item], strategies: Sequence[catalog.Strategy]) -> list[Item]:
    """The general items of a run; marked as anchors where `distill` is to hold them and nothing is to learn them."""
    holding = [each for each in strategies if isinstance(each, catalog.Distill) and "general" in ROLES[each.on]]
    if not any(each.anchor_only for each in holding):
        return general
    return [replace(item, is_anchor=True) for item in general if is_sequence(item)]


def is_sequence(item: Item) -> bool:
    """Whether the item has label rows of one text: preferences have losses of their own."""
    return item.shape in {"text", "demonstration"}


ROLES: dict[str, tuple[Role, ...]] = {
    "general": ("general",),
    "replay": ("replay",),
    "both": ("general", "replay"),
    "all": ("general", "replay", "new"),
}


class Distillation(Learner, supports_distributed=True):
    """KL to a frozen teacher on rehearsed rows. Nothing persists: the teacher is recomputed from frozen weights."""

    name = "distill"

    def __init__(self, parameters: catalog.Distill) -> None:
        super().__init__()
        self.parameters = parameters
        self.teachers: dict[Item, TopLogProbabilities] = {}

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Ask the teacher once about every row that will be held to it."""
        parameters = self.parameters
        held = [item for role in ROLES[parameters.on] for item in strategy.items[role] if is_sequence(item)]
        answers = strategy.teacher_top(held, parameters.teacher, parameters.top) if held else []
        self.teachers = dict(zip(held, answers, strict=True))
        strategy.report(self.name, "examples", len(held))

    def row_term(self, loop: Loop, micro: MicroBatch) -> RowTerm | None:  # noqa: ARG002 - the contract
        """The term of the held items among `micro.items`; None when there are none."""
        teachers = [self.teachers.get(item) for item in micro.items]
        if not any(teachers):
            return None
        weights = [
            self.parameters.strength / (micro.batch_anchor_tokens if item.is_anchor else micro.batch_label_tokens)
            for item in micro.items
        ]
        return HeldRows(micro, teachers, weights, self.parameters.temperature)

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:  # noqa: ARG002 - the callback's contract
        """The answers belong to this update's rows."""
        self.teachers = {}
