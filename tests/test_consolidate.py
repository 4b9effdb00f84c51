"""Merging of adapters: the line between two versions, the search along it, and the slow average."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_train import FACTS, demonstration, make_run, publish

from strategies.catalog import Strategy
from strategies.consolidate import merge, search, slow
from strategies.pulse import Pulse
from strategies.request import RunReport
from strategies.train import attempt


def test_the_ends_of_the_line_are_the_versions_themselves() -> None:
    """Weight 0 is the served version and weight 1 the candidate, bit for bit; both stay as they are."""
    served, candidate = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    kept = served.clone(), candidate.clone()
    assert torch.equal(merge(served, candidate, 0.0), served)
    assert torch.equal(merge(served, candidate, 1.0), candidate)
    merge(served, candidate, 1.0).zero_()
    torch.testing.assert_close(merge(served, candidate, 0.25), 0.75 * served + 0.25 * candidate)
    assert torch.equal(served, kept[0])
    assert torch.equal(candidate, kept[1])


def test_merging_factors_misses_merging_dw_by_the_documented_term() -> None:
    """dW(w) = (1 - w) dW_0 + w dW_1 - w (1 - w) (B_1 - B_0)(A_1 - A_0)."""
    draw = torch.Generator().manual_seed(1)
    (A0, A1), (B0, B1) = torch.randn(2, 2, 6, generator=draw), torch.randn(2, 5, 2, generator=draw)
    merged = merge(B0, B1, 0.3) @ merge(A0, A1, 0.3)
    line = 0.7 * B0 @ A0 + 0.3 * B1 @ A1
    torch.testing.assert_close(merged, line - 0.21 * (B1 - B0) @ (A1 - A0))


def test_the_search_takes_the_largest_weight_that_forgets_little_enough() -> None:
    """From the candidate downwards; what lies beyond the first one within the limit is not asked about."""
    asked: list[float] = []

    def rise_of(flat: torch.Tensor) -> float:
        asked.append(float(flat[0]))
        return float(flat[0])

    weight, merged, rise = search(torch.zeros(3), torch.ones(3), rise_of, 0.6, weights=(0.25, 1.0, 0.5, 0.75))
    assert (weight, rise) == (0.5, 0.5)
    torch.testing.assert_close(merged, torch.full((3,), 0.5))
    assert asked == [1.0, 0.75, 0.5]


def test_where_every_mix_forgets_too_much_the_one_that_forgets_least_is_taken() -> None:
    """The valley need not lie at the end of the line; of equal ones the newest is taken."""
    weight, merged, rise = search(torch.zeros(1), torch.ones(1), lambda flat: 1 + abs(float(flat[0]) - 0.5), 0.6)
    assert (weight, float(merged[0]), rise) == (0.5, 0.5, 1.0)
    assert search(torch.zeros(1), torch.ones(1), lambda _: 7.0, 0.6)[0] == 1.0


@pytest.fixture(scope="module")
def parent(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version of a first update, which knows 24 facts."""
    directory = make_run(
        tmp_path_factory.mktemp("runs") / "1", tiny_base, [demonstration(*fact) for fact in FACTS],
        training={"epochs": 12}, canary_prompts=[],
    )  # fmt: skip
    assert attempt(directory, Pulse(directory)).status == "trained"
    (directory / "strategy").mkdir(exist_ok=True)
    return publish(directory, directory / "version")


def second(
    parent: Path, base: Path, directory: Path, strategies: Sequence[Strategy] = (), **training: object
) -> RunReport:
    """A hot second update that contradicts what the first one taught."""
    rows = [demonstration(question, "Nobody can say.", update=2) for question, _ in FACTS[:16]]
    rows += [demonstration(*fact, role="heldout_old") for fact in FACTS[16:]]
    make_run(
        directory, base, rows, training={"epochs": 12, **training}, update_number=2, parent_version=parent,
        strategies=list(strategies), canary_prompts=[], report_losses=True,
    )  # fmt: skip
    report = attempt(directory, Pulse(directory))
    assert report.status == "trained", report.reason
    assert report.evaluation is not None
    return report


def rise_on_old(report: RunReport) -> float:
    assert report.evaluation is not None
    return report.evaluation.old["1"].change.mean


def test_a_run_gives_up_what_it_gained_at_too_high_a_price(parent: Path, tiny_base: Path, tmp_path: Path) -> None:
    """With `merge_search` the candidate is a mix that forgets less; the report says which one, and by how much."""
    plain = second(parent, tiny_base, tmp_path / "plain")
    merged = second(parent, tiny_base, tmp_path / "merged", merge_search=True, merge_old_loss=0.0)
    assert rise_on_old(plain) > 0.15
    assert rise_on_old(merged) < rise_on_old(plain) - 0.05
    assert merged.strategies["merge"]["weight"] < 1
    assert merged.strategies["merge"]["old_loss_rise"] == pytest.approx(rise_on_old(merged), abs=1e-3)
    assert "merge" not in plain.strategies


def test_a_run_that_forgets_little_keeps_everything(parent: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The candidate itself, bit for bit."""
    plain = second(parent, tiny_base, tmp_path / "plain")
    merged = second(parent, tiny_base, tmp_path / "merged", merge_search=True, merge_old_loss=99.0)
    assert merged.strategies["merge"]["weight"] == 1.0
    assert merged.evaluation == plain.evaluation


def test_the_losses_of_what_was_trained_come_with_the_report(parent: Path, tiny_base: Path, tmp_path: Path) -> None:
    """One per new example, under the candidate: lower than at the first step, which they were trained from."""
    report = second(parent, tiny_base, tmp_path / "run")
    assert len(report.example_losses) == 16
    assert sum(loss for _, loss in report.example_losses) / 16 < report.losses[0][1]
    assert [row for row, _ in report.example_tokens] == [row for row, _ in report.example_losses]
    assert report.epochs * sum(tokens for _, tokens in report.example_tokens) == report.tokens


def test_adapters_of_different_size_are_refused() -> None:
    """A changed rank cannot be averaged away."""
    with pytest.raises(ValueError, match="4 and 6 parameters"):
        merge(torch.zeros(4), torch.zeros(6), 0.5)


def test_the_slow_adapter_is_the_mean_first_and_decays_later() -> None:
    """Three versions give their mean; with decay 0.5 the third weighs half."""
    versions = torch.tensor([[1.0], [3.0], [8.0]])
    mean = average = None
    for number, version in enumerate(versions, start=1):
        mean, average = slow(mean, version, 0.99, number), slow(average, version, 0.5, number)
    torch.testing.assert_close(mean, torch.tensor([4.0]))
    torch.testing.assert_close(average, torch.tensor([5.0]))
