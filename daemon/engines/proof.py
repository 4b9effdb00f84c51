"""Does the engine answer with the version? Decided by the log-probabilities of the canaries' tokens. Pure."""

import msgspec

from daemon.engines.contract import ProbeFailed
from strategies.request import Canary

TOLERANCE_NATS = 0.1
"""Mean difference per token between trainer and engine that number formats explain (bfloat16 against float32)."""
SMALLEST_EFFECT_NATS = 1e-3
"""Canaries that an adapter changes by less cannot prove that it is served."""
UNMISTAKABLE = 0.25
"""So near to the candidate, as a share of the effect, the base cannot be. Then the engine's own base need not be far:
vLLM's CPU build (0.32) answers for the base with the adapter in its last slot when both run in one batch."""


class Match(msgspec.Struct, frozen=True, kw_only=True):
    """Mean absolute differences of log-probabilities over all canary tokens, in nats."""

    to_reference: float
    """Engine with the version, against the trainer's candidate."""
    to_base: float
    """Engine with the version, against the same engine with the base."""
    effect: float
    """Candidate against base, both by the trainer: what `to_base` should be."""


def judge(
    name: str,
    found: list[list[float]],
    base: list[list[float]],
    canaries: list[Canary],
    tolerance: float = TOLERANCE_NATS,
) -> Match:
    """Compare what `name` and the base scored with the trainer's scores; raises `ProbeFailed` with the numbers."""
    reference = [canary.logprobs for canary in canaries]
    match = Match(
        to_reference=distance(found, reference),
        to_base=distance(found, base),
        effect=distance(reference, [canary.base_logprobs for canary in canaries]),
    )
    numbers = (
        f"{match.to_reference:.4f} from the candidate, {match.to_base:.4f} from the base,"
        f" effect {match.effect:.4f} nats per token"
    )
    if not match.effect >= SMALLEST_EFFECT_NATS or match.effect == float("inf"):
        raise ProbeFailed(f"{name}: the canaries cannot tell it from the base ({numbers}); choose other canary prompts")
    if not (match.to_base >= match.effect / 2 or match.to_reference <= match.effect * UNMISTAKABLE):
        raise ProbeFailed(f"{name}: the engine answers like the base ({numbers})")
    if not match.to_reference <= tolerance:
        raise ProbeFailed(f"{name}: the engine does not answer like the candidate ({numbers})")
    return match


def distance(left: list[list[float]], right: list[list[float]]) -> float:
    """Mean absolute difference; infinite for different shapes or nothing to compare, NaN for NaN."""
    if [len(row) for row in left] != [len(row) for row in right] or not any(left):
        return float("inf")
    pairs = [pair for a, b in zip(left, right, strict=True) for pair in zip(a, b, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
