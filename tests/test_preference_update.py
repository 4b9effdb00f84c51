"""Whole updates of nothing but comparisons and ratings, from the experience to the gate's verdict."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_train import make_run, publish, run

from buffers.example import Example, Message
from buffers.experience import Role, Row
from daemon import gate
from daemon.config import Gate
from strategies.request import RunReport

RULES = Gate(drift_base_max=100.0, drift_previous_max=100.0, preference_gain_min=0.02, preference_loss_max=0.03)
LONG = {"epochs": 8, "learning_rate": 2e-2}
KIND, CURT = ("Gladly, reader", "Softly, friend", "Be welcome"), ("No", "Go away", "Ask somebody else")


@pytest.fixture(autouse=True)
def own_sigterm() -> Iterator[None]:
    """A run in this process takes over SIGTERM: give it back."""
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


def preferred(number: int, role: Role, update: int = 1, *, kind: bool = True) -> Row:
    """Two answers to a question, of which the kind one is preferred, or the curt one."""
    draw = random.Random(number)
    answers = [f"{draw.choice(words)}: door {number % 7}." for words in (KIND, CURT)]
    chosen, rejected = answers if kind else answers[::-1]
    asked = (Message(role="user", content=f"Where is door {number}?"),)
    example = Example(shape="comparison", prompt=asked, completion=chosen, rejected=rejected)
    return Row(role=role, update=update, id=number, example=example)


def rated(number: int, role: Role, update: int = 1) -> Row:
    """A kind answer that is liked or a curt one that is not."""
    pair = preferred(number, role, update).example
    said = (pair.completion, pair.rejected or "")[number % 2]
    example = Example(shape="boolean", prompt=pair.prompt, completion=said, label=number % 2 == 0)
    return Row(role=role, update=update, id=number, example=example)


def rows(make: object, first: int, *, update: int = 1, **how: bool) -> list[Row]:
    """Sixteen rows to learn and six of the same kind that are held out."""
    assert callable(make)
    roles: list[Role] = ["new"] * 16 + ["heldout_new"] * 6
    return [make(first + place, role, update, **how) for place, role in enumerate(roles)]


def accepted(report: RunReport, rules: Gate = RULES) -> list[str]:
    """The names of the checks that passed, of a candidate that passed them all."""
    verdict = gate.judge(report, rules)
    assert verdict.outcome == "accepted", verdict.reason
    return [check.name for check in verdict.checks]


@pytest.mark.parametrize("make", [preferred, rated])
def test_preferences_alone_are_learned_and_promoted(tiny_base: Path, tmp_path: Path, make: object) -> None:
    """Held-out preferences decide, and those of before are looked at in the next update, which may not undo them."""
    one = make_run(tmp_path / "one", tiny_base, rows(make, 0), training=LONG)
    report = run(one)
    assert "preference_gain" in accepted(report)
    assert report.evaluation is not None and report.evaluation.new is None
    if make is preferred:
        shares = report.evaluation.preference
        assert shares["before"] == shares["base"] and set(shares) == {"base", "before", "after"}
    # the opposite, in the same questions' words, with what was learned as hold-outs of the past
    known = publish(one, tmp_path / "version")
    old = [make(100 + place, "heldout_old", 1) for place in range(6)]  # type: ignore[operator]
    contrary = [*rows(preferred, 200, update=2, kind=False), *old]
    second = make_run(tmp_path / "two", tiny_base, contrary, parent_version=known, update_number=2, training=LONG)
    verdict = gate.judge(run(second), RULES)
    assert verdict.outcome == "rejected"
    failed = {check.name for check in verdict.checks if not check.passed}
    assert failed <= {"old_preference", "old_preference_base"} and "old_preference" in failed


def test_what_was_not_learned_is_not_promoted(tiny_base: Path, tmp_path: Path) -> None:
    """Comparisons that are decided by a coin teach nothing that holds for others."""
    coin = [preferred(place, row.role, kind=place % 2 == 0) for place, row in enumerate(rows(preferred, 0))]
    verdict = gate.judge(run(make_run(tmp_path / "coin", tiny_base, coin, training=LONG)), RULES)
    assert verdict.outcome == "rejected" and "preference loss on the new hold-out" in verdict.reason
