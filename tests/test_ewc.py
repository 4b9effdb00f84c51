"""EWC's penalty, gradient and merged anchor against their closed forms."""

import pytest
import torch
from torch import Tensor

from strategies.dataset import Item
from strategies.ewc import Anchor, drawn, importance, on_device, online, separate
from strategies.failure import Failure


@pytest.fixture
def vectors() -> list[Tensor]:
    """Twelve vectors of 50 parameters: Fisher information uses their squares."""
    return list(torch.randn(12, 50, generator=torch.Generator().manual_seed(0)))


def test_penalty_and_gradient_are_the_analytic_ones(vectors: list[Tensor]) -> None:
    """lambda/2 sum F (theta - theta*)^2 and lambda F (theta - theta*), which is also its autograd derivative."""
    fisher, mean, theta = vectors[0] ** 2, vectors[1], vectors[2].clone().requires_grad_()
    force, penalty = Anchor(fisher, mean).pull(theta.detach(), 3.0)
    direct = 1.5 * (fisher * (theta - mean) ** 2).sum()
    assert penalty == pytest.approx(float(direct.detach()), rel=1e-6)
    torch.testing.assert_close(force, torch.autograd.grad(direct, theta)[0])


def test_one_anchor_equals_the_sum_of_separate_penalties(vectors: list[Tensor]) -> None:
    """Five merged updates pull and cost what five kept apart would, at any point."""
    fishers, thetas = [vector**2 for vector in vectors[:5]], vectors[5:10]
    fishers[1][:10] = 0  # parameters that one update does not care for
    anchor = None
    for fisher, theta in zip(fishers, thetas, strict=True):
        anchor = separate(anchor, fisher, theta, cap=5)
    assert anchor is not None
    for point in vectors[10:]:
        force, penalty = anchor.pull(point, 2.0)
        pairs = list(zip(fishers, thetas, strict=True))
        torch.testing.assert_close(force, sum(2.0 * f * (point - t) for f, t in pairs), rtol=1e-4, atol=1e-5)
        assert penalty == pytest.approx(sum(float((f * (point - t) ** 2).sum()) for f, t in pairs), rel=1e-5)


def test_online_decays_and_recentres(vectors: list[Tensor]) -> None:
    """F <- gamma F + F_new around the latest weights."""
    first = online(None, vectors[0] ** 2, vectors[1], 0.5)
    second = online(first, vectors[2] ** 2, vectors[3], 0.5)
    torch.testing.assert_close(second.fisher, 0.5 * vectors[0] ** 2 + vectors[2] ** 2)
    torch.testing.assert_close(second.mean, vectors[3])
    assert second.updates == 2


def test_cap_bounds_the_weight_of_the_past(vectors: list[Tensor]) -> None:
    """However many updates there were, they weigh at most as much as `cap` of them."""
    anchor = None
    for _ in range(20):
        anchor = separate(anchor, torch.ones(50), vectors[0], cap=3)
    assert anchor is not None
    assert float(anchor.fisher.mean()) == pytest.approx(3.0, rel=1e-5)
    assert anchor.updates == 20


def test_parameters_that_no_update_cares_for_are_free(vectors: list[Tensor]) -> None:
    """F = 0 twice gives neither a force nor NaN."""
    anchor = separate(Anchor(torch.zeros(50), vectors[0]), torch.zeros(50), vectors[1], cap=4)
    force, penalty = anchor.pull(vectors[2], 1.0)
    assert (force == 0).all()
    assert penalty == 0


def test_importance_has_mean_one_unless_told_otherwise(vectors: list[Tensor]) -> None:
    """A memorised update, whose gradients have nearly vanished, is protected as well as any other."""
    squares = 1e-9 * vectors[0] ** 2
    torch.testing.assert_close(importance(squares, True), importance(vectors[0] ** 2, True))
    assert float(importance(squares, True).mean()) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(importance(squares, False), squares)
    assert (importance(torch.zeros(5), True) == 0).all()


def test_anchor_does_not_share_memory_with_the_weights(vectors: list[Tensor]) -> None:
    """The adapter's vector goes on changing; the anchor must not follow it."""
    theta = vectors[0].clone()
    anchor = online(None, vectors[1] ** 2, theta, 1.0)
    theta += 1
    torch.testing.assert_close(anchor.mean, vectors[0])


def test_state_of_another_adapter_is_refused() -> None:
    """A changed rank must not be explained away: the message says what to do."""
    with pytest.raises(Failure, match=r"ewc: its state has 5 parameters, the adapter 7.*rebase"):
        on_device(torch.zeros(5), torch.zeros(7), "ewc")


def test_drawing_is_without_replacement_and_seeded() -> None:
    """The same generator state draws the same items, each at most once, and never more than there are."""
    items = [Item(index=i, role="new", shape="text", update=1, tokens=[1, 2], start=1) for i in range(9)]
    first, second = (drawn(items, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 4
    assert set(drawn(items, 99, torch.Generator())) == set(items)
