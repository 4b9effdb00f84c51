"""How an accepted version reaches players: at once, step by step, or after a comparison that nobody sees. Pure.

The gate judges what a candidate says about held-out examples; a rollout judges how it does with live requests. What
the gateway and the feedback count is summed up per stage (`Signals`), and `judge` says: wait, pass to the next stage,
or fail. Before its end a stage fails only by what chance does not explain (exact binomial tail below 0.1 %, since it is
looked at again and again); too few requests are never a pass.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from strategies.catalog import NotNegative, Positive

Percent = Annotated[float, msgspec.Meta(gt=0, lt=100)]
Outcome = Literal["wait", "pass", "fail"]
Kind = Literal["shadow", "canary"]
CHANCE = 1e-3
"""What is less likely than this, were the limit kept, is no chance."""
LATENCY_SLACK_MS = 20.0
"""A median that is so much higher is no reason, whatever the ratio."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an accepted version reaches players. All but `immediate` need the gateway."""

    policy: Literal["immediate", "canary", "shadow", "shadow_canary"] = "immediate"
    """`canary`: a growing share of the requests; `shadow`: a comparison before anybody sees it; or both in turn."""
    percentages: list[Percent] = msgspec.field(default_factory=lambda: [5.0, 25.0, 50.0])
    """A canary's shares of the requests, one after the other; after the last the version is live."""
    soak_seconds: Positive = 600.0
    """Every share, and the comparison, lasts at least so long."""
    requests_min: Annotated[int, msgspec.Meta(ge=0)] = 50
    """The candidate must have answered so many requests of a stage before it passes; 0: time alone decides."""
    wait_seconds_max: Positive = 86400.0
    """A stage that has not passed after so long ends the rollout: what cannot be judged is not promoted."""
    error_rate_rise_max: NotNegative = 0.02
    """The share of failed requests may be higher than the live version's by at most so much."""
    latency_ratio_max: Positive = 1.5
    """The median time to the first byte, against the live version's."""
    complaint_rate_rise_max: NotNegative = 0.1
    """Of the feedback on its answers, the share of bad ratings and corrections may be higher by at most so much."""
    shadow_percent: Annotated[float, msgspec.Meta(gt=0, le=100)] = 10.0
    """So many of the requests are put to both versions in the background."""
    divergence_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.8
    """Mean share of words that differ between the two answers, both given greedily."""


class Stage(msgspec.Struct, frozen=True):
    """One step of a rollout."""

    kind: Kind
    percent: float


def stages(settings: Rollout) -> list[Stage]:
    """What a version goes through; nothing: it is live at once."""
    found = [Stage("shadow", settings.shadow_percent)] if settings.policy.startswith("shadow") else []
    if settings.policy.endswith("canary"):
        found += [Stage("canary", percent) for percent in settings.percentages]
    return found


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How a version has done."""

    answered: int = 0
    failed: int = 0
    first_byte_ms: float | None = None
    """The median of its latest answers; of a shadow comparison: the mean until the last byte."""
    feedback: int = 0
    complaints: int = 0

    @property
    def requests(self) -> int:
        """All that came to an end."""
        return self.answered + self.failed

    def rate(self) -> float:
        """The share that failed."""
        return self.failed / self.requests if self.requests else 0.0


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a stage so far."""

    candidate: Counts = Counts()
    stable: Counts = Counts()
    pairs: int = 0
    """Compared answers."""
    divergence: float = 0.0
    """The sum over all pairs."""
    epoch: str = ""
    seen: dict[str, dict[str, float]] = {}
    """The gateway's counters as they stood when last looked at, of its life `epoch`."""


def add(signals: Signals, traffic: Mapping[str, Any], candidate: str, stable: str, kind: Kind) -> Signals:
    """With what the gateway (`GET /traffic`) has counted since the last look; its restart begins at zero again."""
    now = {name: _counters(traffic, name, candidate, kind) for name in (candidate, stable)}
    if not signals.epoch:  # what it has counted before the stage belongs to no stage
        return msgspec.structs.replace(signals, epoch=str(traffic["epoch"]), seen=now)
    before = signals.seen if signals.epoch == traffic["epoch"] else {}
    grown = {name: _grown(before.get(name, {}), row) for name, row in now.items()}
    return msgspec.structs.replace(
        signals,
        candidate=_sum(signals.candidate, grown[candidate], traffic, candidate, kind),
        stable=_sum(signals.stable, grown[stable], traffic, stable, kind),
        pairs=signals.pairs + int(grown[candidate].get("pairs", 0)),
        divergence=signals.divergence + grown[candidate].get("divergence", 0.0),
        epoch=str(traffic["epoch"]), seen=now,
    )  # fmt: skip


def _counters(traffic: Mapping[str, Any], name: str, candidate: str, kind: Kind) -> dict[str, float]:
    if kind == "canary":
        row = traffic["versions"].get(name, {})
        return {key: row.get(key, 0) for key in ("answered", "failed")}
    compared = traffic["comparisons"].get(candidate, {})
    side = compared.get("candidate" if name == candidate else "stable", {})
    shared = {key: compared.get(key, 0) for key in ("pairs", "divergence")} if name == candidate else {}
    return {key: side.get(key, 0) for key in ("answered", "failed", "ms")} | shared


def _grown(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Counters that have fallen were begun anew, as after a version had left the table for a while."""
    is_anew = any(value < before.get(key, 0) for key, value in now.items())
    return {key: value - (0 if is_anew else before.get(key, 0)) for key, value in now.items()}


def _sum(counts: Counts, grown: Mapping[str, float], traffic: Mapping[str, Any], name: str, kind: Kind) -> Counts:
    answered = counts.answered + int(grown["answered"])
    if kind == "canary":
        median = traffic["versions"].get(name, {}).get("first_byte_ms", {}).get("p50")
        latency = counts.first_byte_ms if median is None else float(median)
    else:
        whole = (counts.first_byte_ms or 0.0) * counts.answered + grown["ms"]
        latency = whole / answered if answered else None
    return msgspec.structs.replace(
        counts, answered=answered, failed=counts.failed + int(grown["failed"]), first_byte_ms=latency
    )


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One number of a judgement and its limit."""

    name: str
    value: float
    limit: float
    passed: bool


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with a stage now."""

    outcome: Outcome
    reason: str
    checks: list[Check] = []


def judge(settings: Rollout, kind: Kind, signals: Signals, seconds: float) -> Judgement:
    """`seconds`: since the stage began."""
    enough = signals.candidate.requests >= max(settings.requests_min, 1)
    checks = _checks(settings, kind, signals, is_final=enough and seconds >= settings.soak_seconds, enough=enough)
    if broken := [check for check in checks if not check.passed]:
        return Judgement(outcome="fail", reason="; ".join(map(_words, broken)), checks=checks)
    if seconds < settings.soak_seconds:
        return Judgement(outcome="wait", reason=f"{settings.soak_seconds - seconds:.0f} s to go", checks=checks)
    if signals.candidate.requests >= settings.requests_min:
        return Judgement(outcome="pass", reason="every check passed", checks=checks)
    few = f"{signals.candidate.requests} of {settings.requests_min} requests"
    if seconds >= settings.wait_seconds_max:
        return Judgement(outcome="fail", reason=f"inconclusive: only {few} after {seconds:.0f} s", checks=checks)
    return Judgement(outcome="wait", reason=few, checks=checks)


def _checks(settings: Rollout, kind: Kind, signals: Signals, *, is_final: bool, enough: bool) -> list[Check]:
    candidate, stable = signals.candidate, signals.stable
    checks = [
        _rate(
            "error_rate",
            candidate.failed,
            candidate.requests,
            stable.rate() + settings.error_rate_rise_max,
            exact=is_final,
        )
    ]
    if candidate.feedback:
        usual = stable.complaints / stable.feedback if stable.feedback else 0.0
        limit = usual + settings.complaint_rate_rise_max
        checks.append(_rate("complaint_rate", candidate.complaints, candidate.feedback, limit, exact=False))
    if enough and candidate.first_byte_ms is not None and stable.first_byte_ms is not None:
        limit = settings.latency_ratio_max * stable.first_byte_ms + LATENCY_SLACK_MS
        checks.append(_check("latency_ms", candidate.first_byte_ms, limit))
    if kind == "shadow" and enough and signals.pairs:
        checks.append(_check("divergence", signals.divergence / signals.pairs, settings.divergence_max))
    return checks


def _rate(name: str, bad: int, total: int, limit: float, *, exact: bool) -> Check:
    """The rate itself once a stage is over; before, and for feedback, only what is certain."""
    value = bad / total if total else 0.0
    is_high = value > limit and (exact or chance(bad, total, limit) < CHANCE)
    return Check(name=name, value=value, limit=limit, passed=not is_high)


def _check(name: str, value: float, limit: float) -> Check:
    return Check(name=name, value=value, limit=limit, passed=value <= limit)


def chance(bad: int, total: int, rate: float) -> float:
    """The probability of at least `bad` of `total` (0 < bad <= total) at a true rate: the binomial's upper tail."""
    if rate <= 0 or rate >= 1 or bad <= rate * total:
        return 0.0 if rate <= 0 else 1.0
    ways = math.lgamma(total + 1) - math.lgamma(bad + 1) - math.lgamma(total - bad + 1)
    term = math.exp(ways + bad * math.log(rate) + (total - bad) * math.log1p(-rate))
    tail = term
    for k in range(bad, total):  # above the mean each term is smaller than the one before
        term *= (total - k) / (k + 1) * rate / (1 - rate)
        tail += term
        if term < 1e-9 * tail:
            break
    return tail


def _words(check: Check) -> str:
    return f"{check.name.replace('_', ' ')} {check.value:.3g} above {check.limit:.3g}"
