"""What a candidate gained and lost: the numbers that the gate judges.

Losses are nats per completion token, first averaged over an example's tokens, then over examples; intervals are 95 %
percentile bootstraps over examples (Efron & Tibshirani 1993), paired where two models are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from buffers.example import Example, Message
from strategies.adapter import Adapter
from strategies.dataset import Item, prompt_tokens
from strategies.forward import completion_logprobs, divergence, token_losses
from strategies.request import Canary, Evaluation, Measure, Shift

RESAMPLES = 1000
CANARY_TOKENS = 12
NOISE_EXAMPLES = 8
"""Of each group; the mean over fewer examples is a little noisier, so the floor errs to the careful side."""


@dataclass(frozen=True)
class Probes:
    """What is evaluated: rows that are never trained on."""

    new: list[Item]
    old: dict[int, list[Item]]
    """By the update in which they were new."""
    eval: list[Item]
    general: list[Item] = field(default_factory=list)
    """General text that is neither trained nor an anchor: for drift only."""

    def groups(self) -> dict[str, list[Item]]:
        """All hold-outs by name, each item once; preferences have no token loss to compare."""
        named = {"new": self.new, **{str(number): items for number, items in self.old.items()}, "eval": self.eval}
        return {name: [item for item in items if has_token_loss(item)] for name, items in named.items()}

    def comparisons(self) -> list[Item]:
        """Hold-outs with a preferred and a rejected completion."""
        everything = [*self.new, *(item for items in self.old.values() for item in items), *self.eval]
        return [item for item in everything if item.rejected is not None]

    def drifting(self) -> list[Item]:
        """Where the divergence from a teacher is measured: not where the model is meant to change.

        Without general text: what it should still know, the examples of `eval/` and of past updates.
        """
        general = [item for item in self.general if has_token_loss(item)]
        return general or [item for name, items in self.groups().items() if name != "new" for item in items]


@dataclass(frozen=True)
class Scores:
    """What one set of weights scores on the probes; JSON-able."""

    losses: dict[str, list[float]]
    """Group -> one loss per item."""
    ranked_right: float | None = None
    """Share of comparisons in which the preferred completion is the more probable one."""


def has_token_loss(item: Item) -> bool:
    """Whether the item's loss is that of its completion's tokens, and there are any."""
    return not item.is_preference and item.label_tokens > 0


def score(adapter: Adapter, probes: Probes) -> Scores:
    """Losses and rankings under the adapter's present weights."""
    losses = {name: token_losses(adapter, items).tolist() for name, items in probes.groups().items()}
    return Scores(losses, _ranked_right(adapter, probes.comparisons()))


def _ranked_right(adapter: Adapter, items: Sequence[Item]) -> float | None:
    if not items:
        return None
    right = [bool(pair[0] > pair[1]) for pair in completion_logprobs(adapter, items).values()]
    return sum(right) / len(right)


def noise(adapter: Adapter, probes: Probes, scores: Scores) -> float:
    """Largest difference between `scores` and the same weights evaluated in other micro-batches: the noise floor.

    One example per forward pass costs three times as much as a batch: a few examples of each group are enough.
    """
    differences = []
    for name, items in probes.groups().items():
        few = slice(None, None, max(-(-len(items) // NOISE_EXAMPLES), 1))
        if items:
            alone, together = token_losses(adapter, items[few], tokens=1), torch.tensor(scores.losses[name][few])
            differences.append(abs(float(alone.mean()) - float(together.mean())))
    return max(differences, default=0.0)


def measure(values: Tensor, seed: int = 0) -> Measure:
    """Mean of (examples,) values with its bootstrap interval."""
    values = values.double().cpu()
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Measure(mean=float(values.mean()), low=low, high=high, examples=len(values))


def shift(base: Sequence[float], before: Sequence[float], after: Sequence[float], seed: int) -> Shift | None:
    """One hold-out before and after; None without examples."""
    if not after:
        return None
    old, new = torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
    return Shift(
        base=measure(torch.tensor(base, dtype=torch.float64), seed),
        before=measure(old, seed),
        after=measure(new, seed),
        change=measure(new - old, seed),
    )


def evaluation(
    adapter: Adapter, probes: Probes, base: Scores, before: Scores, previous: Tensor, seed: int
) -> Evaluation:
    """Compare the adapter's present weights with the base and with the weights `previous` (parameters,)."""
    after = score(adapter, probes)
    shifts = {
        name: found
        for name, losses in after.losses.items()
        if (found := shift(base.losses[name], before.losses[name], losses, seed)) is not None
    }
    preference = {"base": base.ranked_right, "before": before.ranked_right, "after": after.ranked_right}
    drift_base, drift_previous = _drift(adapter, probes.drifting(), previous, seed)
    return Evaluation(
        new=shifts.get("new"),
        old={name: found for name, found in shifts.items() if name not in ("new", "eval")},
        eval=shifts.get("eval"),
        drift_base=drift_base,
        drift_previous=drift_previous,
        preference={name: share for name, share in preference.items() if share is not None},
        noise=noise(adapter, probes, after),
    )


def _drift(
    adapter: Adapter, items: Sequence[Item], previous: Tensor, seed: int
) -> tuple[Measure, Measure] | tuple[None, None]:
    if not items:
        return None, None
    from_base = measure(divergence(adapter, items, adapter.disabled()), seed)
    if _answers_like_base(adapter, previous):
        return from_base, from_base
    return from_base, measure(divergence(adapter, items, adapter.holding(previous)), seed)


def _answers_like_base(adapter: Adapter, previous: Tensor) -> bool:
    """Whether `previous` (parameters,) changes nothing, as in a first update: s B A x = 0 where every B is 0."""
    with adapter.holding(previous):
        return not any(bool(weights.any()) for name, weights in adapter.tensors().items() if ".lora_B." in name)


@torch.no_grad()
def canary(adapter: Adapter, prompt: str) -> Canary:
    """The greedy answer to `prompt` as a user's message, with its log-probabilities with and without the adapter."""
    asked: str | tuple[Message, ...] = (Message(role="user", content=prompt),)
    if adapter.tokenizer.chat_template is None:
        asked = prompt
    start = prompt_tokens(Example(shape="demonstration", prompt=asked, completion="-"), adapter.tokenizer)
    tokens = list(start)
    while len(tokens) < len(start) + CANARY_TOKENS and tokens[-1] != adapter.tokenizer.eos_token_id:
        tokens.append(int(_logprobs(adapter, tokens)[-1].argmax()))
    answer = tokens[len(start) :]
    with adapter.disabled():
        under_base = _logprobs_of(adapter, start, answer)
    return Canary(
        prompt=prompt,
        prompt_token_ids=start,
        token_ids=answer,
        logprobs=_logprobs_of(adapter, start, answer),
        base_logprobs=under_base,
        text=str(adapter.tokenizer.decode(answer, skip_special_tokens=True)),
    )


def _logprobs(adapter: Adapter, tokens: list[int]) -> Tensor:
    """(1, vocabulary) log-probabilities of the next token."""
    return adapter.head.logits(adapter.hidden(torch.tensor([tokens]))[-1:]).log_softmax(-1)


def _logprobs_of(adapter: Adapter, start: list[int], answer: list[int]) -> list[float]:
    states = adapter.hidden(torch.tensor([start + answer]))[len(start) - 1 : -1]
    logprobs = adapter.head.logits(states).log_softmax(-1)
    return [float(row[token]) for row, token in zip(logprobs, answer, strict=True)]
