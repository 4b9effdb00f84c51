"""What a search asks of an update: to learn the new, to keep the old, and to stay near the base.

All three are nats per token of hold-outs that were never trained on, as the gate sees them.
"""

from collections.abc import Sequence

import msgspec

from strategies.request import Evaluation, Shift


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """What a setting gained and cost, over the updates of a trial."""

    gain: float
    """The loss on the new hold-out fell by so much."""
    rise: float
    """The loss on the old hold-outs rose by so much; a fall counts as 0: forgetting is what is punished."""
    drift: float
    """KL(base || candidate), the largest of them."""


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """What one nat of each is worth: gain - old x rise - drift x drift - beyond x what lies over the gate's limits."""

    old: float = 1.0
    """A nat lost on the old is as bad as a nat gained on the new is good."""
    drift: float = 0.1
    """The gate allows far more of it (1.0 nat against 0.15 of the old)."""
    old_max: float = 0.15
    drift_max: float = 1.0
    """The gate's limits. What it would reject is worth nothing, however much is gained: measured, a high learning rate
    bought 8.8 nats of gain with 5.3 of drift."""
    beyond: float = 10.0
    """Slope, not a wall: a sampler can tell which way is back."""


def score_of(evaluation: Evaluation) -> Score | None:
    """Of one update; None without a new hold-out, which leaves nothing to score."""
    if evaluation.new is None:
        return None
    drift = evaluation.drift_base.mean if evaluation.drift_base is not None else 0.0
    return Score(gain=-evaluation.new.change.mean, rise=max(_rise(list(evaluation.old.values())), 0.0), drift=drift)


def _rise(shifts: Sequence[Shift]) -> float:
    """Mean over all examples, whichever update they come from."""
    examples = sum(shift.change.examples for shift in shifts)
    return sum(shift.change.mean * shift.change.examples for shift in shifts) / max(examples, 1)


def mean(scores: Sequence[Score]) -> Score:
    """Over the updates of one trial. Of the drift the largest, for it accumulates: a mean over a chain makes light of
    what its last update, and every later one, would be rejected for."""
    count = len(scores)
    return Score(
        gain=sum(each.gain for each in scores) / count,
        rise=sum(each.rise for each in scores) / count,
        drift=max(each.drift for each in scores),
    )


def weighted(score: Score, weights: Weights) -> float:
    """One number, the larger the better."""
    excess = max(score.rise - weights.old_max, 0.0) + max(score.drift - weights.drift_max, 0.0)
    return score.gain - weights.old * score.rise - weights.drift * score.drift - weights.beyond * excess


def is_dominated(score: Score, others: Sequence[Score]) -> bool:
    """Whether another score is at least as good in everything and better in something (Pareto)."""

    def beats(other: Score) -> bool:
        pairs = [(other.gain, score.gain), (-other.rise, -score.rise), (-other.drift, -score.drift)]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return any(beats(other) for other in others)
