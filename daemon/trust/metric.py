"""What the numbers in feedback mean: `[metrics.NAME]`, and what a number of one subject says.

Subjects use a scale differently: one gives five stars to whatever works, another to nothing. A rating is therefore
counted in standard deviations from what its own subject has given so far (z). A subject with few ratings has no mean
of its own yet: the middle of the range and a quarter of it stand for `PRIOR` ratings more.
"""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from strategies.catalog import Positive

PRIOR = 4
PAST_MAX = 200
"""A subject's mean is that of its newest so many ratings."""


class Metric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one metric of feedback records means: only floats of a metric that is described here are learned from."""

    type: Literal["boolean", "float", "categorical"]
    """The kind of record that has it; another kind with this metric is refused."""
    low: float = 0.0
    """Of a float: the least value; what lies beyond the range is refused."""
    high: float = 1.0
    """Of a float: the greatest value."""
    direction: Literal["higher", "lower"] = "higher"
    """Of a float: which values are good. Of a boolean `true` always is."""
    learn: Literal["ratings", "pairs", "nothing"] = "ratings"
    """Of a float: `ratings` makes a good or a bad answer of it (KTO), `pairs` compares two answers that one subject
    rated for the same prompt (DPO), `nothing` only stores it."""
    threshold: Positive = 0.5
    """`ratings`: good from so many standard deviations above what the subject usually gives, bad from as many below;
    what lies between says nothing."""
    difference: Positive = 1.0
    """`pairs`: two ratings must lie at least so many of the subject's standard deviations apart."""


def trouble_with(metric: Metric) -> str | None:
    """Why a metric cannot be used, or None."""
    if not (math.isfinite(metric.low) and math.isfinite(metric.high) and metric.low < metric.high):
        return f"low = {metric.low:g}, high = {metric.high:g}: give a range, `low` below `high`"
    if metric.type != "float" and (metric.direction != "higher" or metric.learn != "ratings"):
        return f"direction and learn are for floats; of a {metric.type} leave them out"
    return None


def refusal(metric: Metric, kind: str, value: object) -> str | None:
    """Why a record of this kind and value is none of the metric's, or None."""
    if kind not in ("boolean", "float", "categorical"):
        return None
    if kind != metric.type:
        return f"the metric is a {metric.type} ([metrics.NAME] type) and the record a {kind}"
    if isinstance(value, int | float) and kind == "float" and not metric.low <= value <= metric.high:
        return f"{value:g} is outside of the metric's range {metric.low:g} to {metric.high:g}"
    return None


def score_of(metric: Metric, value: float, past: Sequence[float]) -> float:
    """z of a rating, positive where it is good: standard deviations from what its subject gave before (`past`)."""
    middle, spread = (metric.low + metric.high) / 2, (metric.high - metric.low) / 4
    count = PRIOR + len(past)
    mean = (PRIOR * middle + math.fsum(past)) / count
    variance = (PRIOR * (spread**2 + (middle - mean) ** 2) + math.fsum((each - mean) ** 2 for each in past)) / count
    z = (value - mean) / math.sqrt(variance)
    return z if metric.direction == "higher" else -z


def label_of(metric: Metric, z: float) -> bool | None:
    """Whether an answer was good; None where the rating does not say."""
    return None if abs(z) < metric.threshold else z > 0
