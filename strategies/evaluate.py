"""What a candidate gained and lost: the numbers that the gate judges.

Losses are nats per completion token, first averaged over an example's tokens, then over examples; intervals are 95 %
percentile bootstraps over examples (Efron & Tibshirani 1993), paired where two models are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from strategies.adapter import Adapter
from strategies.dataset import Item
from strategies.forward import completion_logprobs, divergences, learn_losses, states, token_losses
from strategies.preference import BETA, judged_losses
from strategies.remembered import Remembered
from strategies.request import Evaluation, Measure, Shift

RESAMPLES = 1000
NOISE_EXAMPLES = 8
"""In all; the mean over fewer examples is a little noisier, so the floor errs to the careful side."""


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
        named = {**self._named(), "general": self.general}
        return {name: [item for item in items if has_token_loss(item)] for name, items in named.items()}

    def judgements(self) -> dict[str, list[Item]]:
        """The comparisons and ratings among the hold-outs, by the same names; names without any are left out."""
        found = {name: [item for item in items if item.is_preference] for name, items in self._named().items()}
        return {name: items for name, items in found.items() if items}

    def _named(self) -> dict[str, list[Item]]:
        old = {str(number): items for number, items in self.old.items()}
        return {"new": self.new, **old, "eval": self.eval}

    def drifting(self) -> list[Item]:
        """Where the divergence from a teacher is measured: not where the model is meant to change.

        Without general text: what it should still know, the examples of `eval/` and of past updates.
        """
        groups = self.groups()
        return groups["general"] or [item for name, items in groups.items() if name != "new" for item in items]


@dataclass(frozen=True)
class Scores:
    """What one set of weights scores on the probes; JSON-able."""

    losses: dict[str, list[float]]
    """Group -> one loss per item."""
    judgements: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Group -> summed log-probabilities of completion and rejected completion, one pair per comparison or rating."""
    ranked_right: float | None = None
    """Share of comparisons in which the preferred completion is the more probable one."""


@dataclass(frozen=True)
class Standing:
    """What one set of weights says about the probes: taken while they are in the adapter, compared with later ones."""

    scores: Scores
    states: dict[Item, Tensor]
    """(label rows, hidden) of the items on which drift is measured."""


def has_token_loss(item: Item) -> bool:
    """Whether the item's loss is that of its completion's tokens, and there are any."""
    return not item.is_preference and item.label_tokens > 0


def standing(adapter: Adapter, probes: Probes, remembered: Remembered | None = None) -> Standing:
    """What the adapter's present weights say about the probes: one pass for the losses and the states of a text.

    `remembered`: what these weights have said before, which is not asked again; it learns the rest.
    """
    items, everything = probes.drifting(), [item for items in probes.groups().values() for item in items]
    known = {} if remembered is None else remembered.recall(adapter, everything)
    missing = [item for item in items if item not in known]
    found = states(adapter, missing)
    learn_losses(adapter, missing, found)
    made = Standing(score(adapter, probes), {item: state for item, state in (known | found).items() if item in items})
    if remembered is not None:
        remembered.keep(adapter, everything, made.states)
    return made


def score(adapter: Adapter, probes: Probes) -> Scores:
    """Losses, judgements and rankings under the adapter's present weights."""
    token_losses(adapter, [item for items in probes.groups().values() for item in items])  # all of them in few passes
    losses = {name: token_losses(adapter, items).tolist() for name, items in probes.groups().items()}
    groups = probes.judgements()
    found = completion_logprobs(adapter, [item for items in groups.values() for item in items])
    pairs = {item: (float(pair[0]), float(pair[1])) for item, pair in found.items()}
    right = [chosen > rejected for item, (chosen, rejected) in pairs.items() if item.rejected is not None]
    judgements = {name: [pairs[item] for item in items] for name, items in groups.items()}
    return Scores(losses, judgements, sum(right) / len(right) if right else None)


def noise(adapter: Adapter, probes: Probes, scores: Scores) -> float:
    """How far `scores` lie from the same weights evaluated in other micro-batches: the noise floor of a mean.

    One example per forward pass costs three times as much as a batch, so a few examples speak for all. The larger of
    their mean difference and its standard error: differences that happen to cancel out are noise, too.
    """
    pairs = [pair for name, items in probes.groups().items() for pair in zip(items, scores.losses[name], strict=True)]
    few = pairs[:: max(-(-len(pairs) // NOISE_EXAMPLES), 1)]
    if not few:
        return 0.0
    alone = token_losses(adapter, [item for item, _ in few], tokens=1)
    differences = alone - torch.tensor([loss for _, loss in few], dtype=torch.float64)
    return max(abs(float(differences.mean())), float(differences.square().mean().sqrt()) / len(few) ** 0.5)


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
    adapter: Adapter, probes: Probes, base: Standing, before: Standing, after: Standing, seed: int, floor: float,
    beta: float = BETA,
) -> Evaluation:  # fmt: skip
    """Compare the adapter's present weights with the base and with the weights that the run started from.

    `floor`: see `noise`; `beta`: of the preference losses.
    """
    shifts = {
        name: found
        for name, losses in after.scores.losses.items()
        if (found := shift(base.scores.losses[name], before.scores.losses[name], losses, seed)) is not None
    }
    standings = {"base": base, "before": before, "after": after}
    ranked = {name: each.scores.ranked_right for name, each in standings.items()}
    drift_base, drift_previous = _drift(adapter, probes.drifting(), base, before, after, seed)
    return Evaluation(
        new=shifts.get("new"),
        old={name: found for name, found in shifts.items() if name not in ("new", "eval", "general")},
        eval=shifts.get("eval"),
        general=shifts.get("general"),
        drift_base=drift_base,
        drift_previous=drift_previous,
        preference={name: share for name, share in ranked.items() if share is not None},
        preference_losses=_judged(probes, base.scores, before.scores, after.scores, seed, beta),
        noise=floor,
    )


def _judged(
    probes: Probes, base: Scores, before: Scores, after: Scores, seed: int, beta: float
) -> dict[str, Shift]:  # fmt: skip
    """Group -> its preference losses. The base is the reference of all three: versions of any age are comparable."""
    shifts: dict[str, Shift] = {}
    for name, items in probes.judgements().items():
        reference = base.judgements[name]
        losses = [judged_losses(items, each.judgements[name], reference, beta) for each in (base, before, after)]
        if (found := shift(losses[0], losses[1], losses[2], seed)) is not None:
            shifts[name] = found
    return shifts


def _drift(
    adapter: Adapter, items: Sequence[Item], base: Standing, before: Standing, after: Standing, seed: int
) -> tuple[Measure, Measure] | tuple[None, None]:
    if not items:
        return None, None
    from_base = measure(divergences(adapter, items, base.states, after.states), seed)
    if before is base:  # a first update starts from the base: both are one
        return from_base, from_base
    return from_base, measure(divergences(adapter, items, before.states, after.states), seed)
