"""The gate: judges a candidate by the numbers of its report. Pure; what cannot be judged is not promoted."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from daemon.config import Gate
from strategies.request import Evaluation, RunReport, Shift


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One number against its limit."""

    name: str
    value: float
    limit: float
    passed: bool
    message: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The gate's answer on a candidate."""

    outcome: Literal["accepted", "rejected", "inconclusive"]
    checks: list[Check]

    @property
    def reason(self) -> str:
        """One line: what did not pass, or what was gained."""
        failed = [check.message for check in self.checks if not check.passed]
        return "; ".join(failed or [check.message for check in self.checks[:1]])


def judge(report: RunReport, rules: Gate) -> Verdict:
    """Accepted only if every check passes; inconclusive if what is needed to judge is missing."""
    evaluation = report.evaluation
    found = 0 if evaluation is None else _heldout(evaluation)
    if evaluation is None or found < max(rules.heldout_min, 1):
        missing = Check(
            name="heldout", value=found, limit=rules.heldout_min, passed=False,
            message=f"cannot decide: {found} held-out examples of the new ones, {rules.heldout_min} needed;"
            " drop more examples or lower [models.NAME.gate] heldout_min",
        )  # fmt: skip
        return Verdict(outcome="inconclusive", checks=[missing])
    checks = [
        *_learned(evaluation, rules),
        *_retention(evaluation, rules),
        *_preferences(evaluation, rules),
        *_drift(evaluation, rules),
    ]
    return Verdict(outcome="accepted" if all(check.passed for check in checks) else "rejected", checks=checks)


def _heldout(evaluation: Evaluation) -> int:
    """Examples of the new hold-out, those with a loss per token and those that are compared or rated."""
    shifts = (evaluation.new, evaluation.preference_losses.get("new"))
    return sum(shift.after.examples for shift in shifts if shift is not None)


def _learned(evaluation: Evaluation, rules: Gate) -> Iterable[Check]:
    """What is new must have been learned; where an update has both, its texts and demonstrations say so."""
    new, judged = evaluation.new, evaluation.preference_losses.get("new")
    if new is not None and new.after.examples:
        yield _gain(new, evaluation.noise, rules)
    elif judged is not None:
        gain, needed = -judged.change.mean, rules.preference_gain_min
        yield Check(
            name="preference_gain", value=gain, limit=needed, passed=gain >= needed,
            message=f"preference loss on the new hold-out {judged.before.mean:.3f} -> {judged.after.mean:.3f}"
            f" (gain {gain:.3f}, needed {needed:.3f}, {judged.after.examples} examples)",
        )  # fmt: skip


def _gain(new: Shift, noise: float, rules: Gate) -> Check:
    gain, needed = -new.change.mean, max(rules.new_gain_min, noise)
    return Check(
        name="new_gain", value=gain, limit=needed, passed=gain >= needed,
        message=f"loss on the new hold-out {new.before.mean:.3f} -> {new.after.mean:.3f} nats per token"
        f" (gain {gain:.3f}, needed {needed:.3f}, {new.after.examples} examples)",
    )  # fmt: skip


def _retention(evaluation: Evaluation, rules: Gate) -> Iterable[Check]:
    if evaluation.old:
        old = list(evaluation.old.values())
        limit = max(rules.old_loss_max, evaluation.noise)  # less than the noise floor cannot be told from nothing
        yield _rise("old_loss", "the old hold-outs against the served version", old, limit, "before")
        # slow creep: each update may be within its limit and all of them together may not
        yield _rise("old_loss_base", "the old hold-outs against the base", old, limit, "base")
    if evaluation.eval is not None:
        yield _rise("eval_loss", "the examples of eval/", [evaluation.eval], rules.eval_loss_max, "before")


def _preferences(evaluation: Evaluation, rules: Gate) -> Iterable[Check]:
    """What was preferred is to be preferred still; the base's own loss is the yardstick, so creep shows as well."""
    known, limit = evaluation.preference_losses, rules.preference_loss_max
    if evaluation.new is not None and "new" in known:
        yield _rise("new_preference", "the new comparisons and ratings", [known["new"]], limit, "before", PREFERENCE)
    if "eval" in known:
        yield _rise("eval_preference", "the comparisons of eval/", [known["eval"]], limit, "before", PREFERENCE)
    old = [shift for name, shift in known.items() if name not in ("new", "eval")]
    if old:
        what = "the old comparisons and ratings against the"
        yield _rise("old_preference", f"{what} served version", old, limit, "before", PREFERENCE)
        yield _rise("old_preference_base", f"{what} base", old, limit, "base", PREFERENCE)


NATS, PREFERENCE = "nats per token", "of DPO and KTO"
"""What the losses are counted in."""


def _rise(
    name: str, what: str, shifts: list[Shift], limit: float, against: Literal["before", "base"], unit: str = NATS
) -> Check:
    examples = sum(shift.after.examples for shift in shifts)
    rise = sum(
        (shift.after.mean - getattr(shift, against).mean) * shift.after.examples for shift in shifts
    ) / max(examples, 1)  # fmt: skip
    return Check(
        name=name, value=rise, limit=limit, passed=rise <= limit,
        message=f"loss on {what} changed by {rise:+.3f} {unit} (at most {limit:+.3f}, {examples} examples)",
    )  # fmt: skip


def _drift(evaluation: Evaluation, rules: Gate) -> Iterable[Check]:
    for name, what, drift, limit in (
        ("drift_base", "base", evaluation.drift_base, rules.drift_base_max),
        ("drift_previous", "served version", evaluation.drift_previous, rules.drift_previous_max),
    ):
        if drift is not None:
            yield Check(
                name=name, value=drift.mean, limit=limit, passed=drift.mean <= limit,
                message=f"KL({what} || candidate) {drift.mean:.3f} nats per token (at most {limit:.3f})",
            )  # fmt: skip
    if evaluation.general is not None:
        limit = max(rules.general_loss_max, evaluation.noise)
        yield _rise("general_loss", "general text against the base", [evaluation.general], limit, "base")
