"""What a candidate must prove."""

from hypothesis import given
from hypothesis import strategies as st

from daemon.config import Gate
from daemon.gate import judge
from strategies.request import Evaluation, Measure, RunReport, Shift

RULES = Gate(new_gain_min=0.1, old_loss_max=0.2, eval_loss_max=0.2, drift_base_max=0.5)


def measure(mean: float, examples: int = 10) -> Measure:
    return Measure(mean=mean, low=mean - 0.1, high=mean + 0.1, examples=examples)


def shift(base: float, before: float, after: float, examples: int = 10) -> Shift:
    return Shift(
        base=measure(base, examples), before=measure(before, examples), after=measure(after, examples),
        change=measure(after - before, examples),
    )  # fmt: skip


def report(**evaluation: object) -> RunReport:
    return RunReport(run_id="r", status="trained", evaluation=Evaluation(**evaluation))  # type: ignore[arg-type]


GOOD = {"new": shift(3, 3, 2), "old": {"1": shift(3, 2, 2.1)}, "drift_base": measure(0.2)}


def names_of_failed(candidate: RunReport, rules: Gate = RULES) -> list[str]:
    return [check.name for check in judge(candidate, rules).checks if not check.passed]


def test_a_candidate_that_learned_and_kept_is_accepted() -> None:
    """Gain above the limit, old losses and drift below theirs."""
    verdict = judge(report(**GOOD), RULES)
    assert verdict.outcome == "accepted"
    assert "3.000 -> 2.000" in verdict.reason


def test_each_limit_rejects_by_itself() -> None:
    """One number beyond its limit is enough, and the reason names it."""
    assert names_of_failed(report(**GOOD | {"new": shift(3, 3, 2.95)})) == ["new_gain"]
    assert names_of_failed(report(**GOOD | {"old": {"1": shift(3, 2, 2.3)}})) == ["old_loss"]
    assert names_of_failed(report(**GOOD | {"eval": shift(3, 2, 2.5)})) == ["eval_loss"]
    assert names_of_failed(report(**GOOD | {"drift_base": measure(0.6)})) == ["drift_base"]
    assert "0.600" in judge(report(**GOOD | {"drift_base": measure(0.6)}), RULES).reason


def test_slow_creep_is_measured_against_the_base() -> None:
    """A step within its limit is still rejected when the old hold-outs are by now worse than in the base model."""
    assert names_of_failed(report(**GOOD | {"old": {"1": shift(2, 2.15, 2.3)}})) == ["old_loss_base"]


def test_old_holdouts_are_weighted_by_their_examples() -> None:
    """One example of an old update that got worse does not outweigh forty that did not."""
    old = {"1": shift(3, 2, 3, examples=1), "2": shift(3, 2, 2, examples=40)}
    assert judge(report(**GOOD | {"old": old}), RULES).outcome == "accepted"


def test_a_gain_below_the_noise_is_no_gain() -> None:
    """The evaluator's own noise is the least gain that counts."""
    assert names_of_failed(report(**GOOD | {"noise": 1.5})) == ["new_gain"]


def test_what_cannot_be_judged_is_inconclusive_never_accepted() -> None:
    """No hold-out, too small a hold-out, or an evaluator that gave nothing."""
    for candidate in (
        report(new=None),
        report(new=shift(3, 3, 1, examples=0)),
        RunReport(run_id="r", status="trained"),
    ):
        verdict = judge(candidate, RULES)
        assert verdict.outcome == "inconclusive"
        assert "held-out" in verdict.reason


@given(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(["new", "old", "drift_base"]))
def test_a_number_that_is_no_number_never_passes(value: float, where: str) -> None:
    """NaN compares false with everything: whatever is accepted has finite numbers within the limits."""
    bad = {"new": shift(3, 3, value), "old": {"1": shift(3, 2, value)}, "drift_base": measure(value)}
    candidate = report(**GOOD | {where: bad[where]})
    verdict = judge(candidate, RULES)
    assert verdict.outcome == "rejected" or all(check.value == check.value for check in verdict.checks)


def test_one_update_may_not_change_everything() -> None:
    """Drift is limited against the served version as well as against the base."""
    assert names_of_failed(report(**GOOD | {"drift_previous": measure(1.2)})) == ["drift_previous"]
    assert names_of_failed(report(**GOOD | {"drift_previous": measure(0.9)})) == []


def test_general_text_is_compared_with_the_base() -> None:
    """A slow creep shows there, whatever each single update did."""
    assert names_of_failed(report(**GOOD | {"general": shift(3.0, 4.2, 4.3)})) == ["general_loss"]
    assert names_of_failed(report(**GOOD | {"general": shift(3.0, 3.1, 3.2)})) == []


def test_a_rise_within_the_noise_floor_is_none() -> None:
    """What the evaluator itself wavers by cannot be held against a candidate."""
    risen = GOOD | {"old": {"1": shift(3, 2, 2.3)}}
    assert names_of_failed(report(**risen)) == ["old_loss"]
    assert names_of_failed(report(**risen | {"noise": 0.4})) == []


def test_an_update_of_preferences_alone_is_judged_by_them() -> None:
    """What players compare and rate has no loss per token: the loss of DPO and KTO on what was held out decides."""
    learned, missed = ({"new": shift(0.693, 0.6, after)} for after in (0.5, 0.599))
    assert judge(report(new=None, preference_losses=learned), RULES).outcome == "accepted"
    assert "0.600 -> 0.500" in judge(report(new=None, preference_losses=learned), RULES).reason
    assert names_of_failed(report(new=None, preference_losses=missed)) == ["preference_gain"]
    none = {"new": shift(0.693, 0.6, 0.5, examples=0)}
    assert judge(report(new=None, preference_losses=none), RULES).outcome == "inconclusive"
    few = judge(report(new=None, preference_losses=learned), Gate(heldout_min=11))
    assert few.outcome == "inconclusive" and "10 held-out" in few.reason


def test_preferences_may_not_be_forgotten() -> None:
    """Neither those of past updates, against the served version and the base, nor those of eval/, nor new ones."""
    for name, losses, failed in (
        ("1", shift(0.693, 0.4, 0.55), "old_preference"),
        ("1", shift(0.693, 0.75, 0.82), "old_preference_base"),
        ("eval", shift(0.693, 0.4, 0.55), "eval_preference"),
        ("new", shift(0.693, 0.6, 0.75), "new_preference"),
    ):
        assert names_of_failed(report(**GOOD, preference_losses={name: losses})) == [failed]
        kept = shift(0.693, losses.before.mean - 0.1, losses.before.mean - 0.05)
        assert judge(report(**GOOD, preference_losses={name: kept}), RULES).outcome == "accepted"
