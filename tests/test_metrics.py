"""Sequence metrics on matrices small enough to compute by hand."""

import numpy as np
import pytest

from strategies.metrics import (
    accuracy,
    backward_transfer,
    bootstrap,
    forgetting,
    forward_transfer,
    intransigence,
)

R = np.array([[0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.6, 0.4, 0.7]])


def test_by_hand() -> None:
    """Three updates, three tasks: every metric as on paper."""
    assert accuracy(R) == pytest.approx((0.6 + 0.4 + 0.7) / 3)
    assert backward_transfer(R) == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 2)
    assert forward_transfer(R, [0.0, 0.1, 0.1]) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert forgetting(R) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)
    assert intransigence(R, [1.0, 0.9, 0.9]) == pytest.approx((0.1 + 0.1 + 0.2) / 3)


def test_forgetting_is_measured_from_the_best_score() -> None:
    """A later gain that is lost again counts as forgetting, though backward transfer does not see it."""
    gained = np.array([[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.5, 0.5, 0.5]])
    assert backward_transfer(gained) == 0
    assert forgetting(gained) == pytest.approx(0.2)


def test_one_task_forgets_nothing() -> None:
    """Transfer and forgetting need a second update; until then they are 0, not NaN."""
    one = np.array([[0.7]])
    assert (accuracy(one), backward_transfer(one), forward_transfer(one, [0.1]), forgetting(one)) == (0.7, 0, 0, 0)


@pytest.mark.parametrize("shape", [(2, 3), (0, 0), (4,)])
def test_a_matrix_that_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    """A missing row would shift every number; the message names the shape."""
    with pytest.raises(ValueError, match="square"):
        accuracy(np.zeros(shape))


def test_forward_transfer_needs_a_score_for_every_task() -> None:
    """The untrained model's scores and the matrix must be of the same tasks."""
    with pytest.raises(ValueError, match="2 scores before any update for 3 tasks"):
        forward_transfer(R, [0.1, 0.1])


def test_bootstrap_covers_the_mean_and_is_seeded() -> None:
    """95 % intervals of 300 normal samples hold the true mean about 95 times in 100, and twice give the same."""
    samples = np.random.default_rng(0).normal(2.0, 1.0, size=(300, 60))
    intervals = [bootstrap(list(sample), draws=400) for sample in samples]
    held = np.mean([low <= 2.0 <= high for low, high in intervals])
    assert 0.90 <= held <= 0.99
    assert bootstrap([1.0, 2.0, 4.0], seed=7) == bootstrap([1.0, 2.0, 4.0], seed=7)
    assert bootstrap([3.0]) == (3.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])
