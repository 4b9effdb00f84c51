"""Merging of adapters: the line between two versions, the search along it, and the slow average."""

import pytest
import torch

from strategies.consolidate import merge, search, slow


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


def test_the_search_takes_the_largest_accepted_weight() -> None:
    """From the candidate downwards; what lies beyond the first accepted one is not asked about."""
    asked: list[float] = []

    def is_accepted(flat: torch.Tensor) -> bool:
        asked.append(float(flat[0]))
        return float(flat[0]) <= 0.6

    found = search(torch.zeros(3), torch.ones(3), is_accepted, weights=(0.25, 1.0, 0.5, 0.75))
    assert found is not None
    assert found[0] == 0.5
    torch.testing.assert_close(found[1], torch.full((3,), 0.5))
    assert asked == [1.0, 0.75, 0.5]


def test_nothing_accepted_is_nothing_found() -> None:
    """The served version then stays: it needs no merge."""
    assert search(torch.zeros(2), torch.ones(2), lambda _: False) is None


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
