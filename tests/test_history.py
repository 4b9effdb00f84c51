"""What updates did to each other, carried from version to version: closed forms, bounds, and two real runs."""

from pathlib import Path

import numpy as np
import pytest
from test_train import FACTS, demonstration, make_run, publish

from strategies import history, metrics
from strategies.history import History, after_update, read_history, sequence_metrics, write_history
from strategies.pulse import Pulse
from strategies.request import RunReport
from strategies.train import attempt

LOSSES = np.random.default_rng(0).uniform(0.5, 3.0, (3, 3, 4))
"""(update, task, example): made-up losses of three updates on the hold-outs of all three."""


def groups(update: int) -> dict[str, dict[int, float]]:
    """What an update is scored on: its own hold-out and those before it, four examples each."""
    names = {task: "new" if task == update else str(task + 1) for task in range(update + 1)}
    return {
        names[task]: {10 * task + place: float(loss) for place, loss in enumerate(LOSSES[update, task])}
        for task in range(update + 1)
    }


def two_updates() -> History:
    return after_update(after_update(History(), 1, groups(0)), 2, groups(1))


def test_the_numbers_are_those_of_the_accuracy_matrix() -> None:
    """ACC, BWT and R of equally large hold-outs are what the closed forms give on R = -mean loss."""
    found = sequence_metrics(two_updates(), groups(2), groups(2), groups(2), 3, seed=0)
    R = -LOSSES.mean(axis=2)
    assert found.acc is not None and found.bwt is not None and found.forgetting is not None
    assert found.acc.mean == pytest.approx(metrics.accuracy(R)) and found.acc.examples == 12
    assert found.bwt.mean == pytest.approx(metrics.backward_transfer(R)) and found.bwt.examples == 8
    assert found.bwt.low < found.bwt.mean < found.bwt.high
    assert found.matrix["3"]["1"] == pytest.approx(R[2, 0]) and found.matrix["2"]["2"] == pytest.approx(R[1, 1])
    assert set(found.matrix) == {"1", "2", "3"} and set(found.matrix["1"]) == {"1"}


def test_forgetting_is_counted_from_the_best_score_of_each_example() -> None:
    """Where BWT counts from the first: an example that got better meanwhile has more to lose."""
    found = sequence_metrics(two_updates(), groups(2), {}, {}, 3, seed=0)
    best = np.concatenate([LOSSES[:2, 0].min(axis=0), LOSSES[1, 1]])
    assert found.forgetting is not None
    assert found.forgetting.mean == pytest.approx(float((LOSSES[2, :2].reshape(-1) - best).mean()))


def test_forward_transfer_is_what_was_known_before_beyond_the_base() -> None:
    """Paired over the new hold-out; nothing without one."""
    base, before = {"new": {1: 3.0, 2: 2.0}}, {"new": {1: 2.5, 2: 1.9}}
    found = sequence_metrics(History(), {"new": {1: 1.0, 2: 1.0}}, base, before, 1, seed=0)
    assert found.fwt is not None and found.fwt.mean == pytest.approx(0.3)
    assert (found.bwt, found.forgetting) == (None, None)
    assert sequence_metrics(History(), {}, {}, {}, 1, seed=0).acc is None


def test_a_history_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest updates and examples stay, however many there were."""
    monkeypatch.setattr(history, "ROWS", 2)
    monkeypatch.setattr(history, "EXAMPLES", 5)
    found = after_update(two_updates(), 3, groups(2))
    assert list(found.matrix) == ["2", "3"] and len(found.examples) == 5


def test_it_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """A version without one has no past."""
    (tmp_path / "strategy").mkdir()
    assert read_history(None) == read_history(tmp_path) == History()
    write_history(tmp_path / "strategy", two_updates())
    assert read_history(tmp_path) == two_updates()


def run(directory: Path, base: Path, *rows: object, **fields: object) -> RunReport:
    make_run(directory, base, list(rows), training={"epochs": 2}, canary_prompts=[], **fields)  # type: ignore[arg-type]
    report = attempt(directory, Pulse(directory))
    assert report.status == "trained", report.reason
    return report


def test_two_runs_tell_what_the_second_did_to_the_first(tiny_base: Path, tmp_path: Path) -> None:
    """Its loss on the first one's hold-out against what it was then, by the report and by the version's file."""
    tested = [(fact, 100 + place) for place, fact in enumerate(FACTS[8:12])]
    first = run(tmp_path / "1", tiny_base, *(demonstration(*fact) for fact in FACTS[:8]),
                *(demonstration(*fact, role="heldout_new", identity=row) for fact, row in tested))  # fmt: skip
    version = publish(tmp_path / "1", tmp_path / "version")
    second = run(tmp_path / "2", tiny_base, *(demonstration(*fact, update=2) for fact in FACTS[12:20]),
                 *(demonstration(*fact, role="heldout_old", identity=row) for fact, row in tested),
                 update_number=2, parent_version=version)  # fmt: skip
    assert first.evaluation is not None and first.evaluation.new is not None and first.evaluation.sequence is not None
    assert second.evaluation is not None and second.evaluation.sequence is not None
    learned, now = first.evaluation.new.after.mean, second.evaluation.old["1"].after.mean
    assert second.evaluation.sequence.bwt is not None
    assert second.evaluation.sequence.bwt.mean == pytest.approx(learned - now)
    assert second.evaluation.sequence.matrix == {"1": {"1": pytest.approx(-learned)}, "2": {"1": pytest.approx(-now)}}
