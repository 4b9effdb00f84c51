"""Synaptic intelligence: the path integral against the true change of the loss, and its importances by hand."""

import sys
from pathlib import Path

import pytest
import torch

from strategies import catalog
from strategies.plugins import build
from strategies.si import consolidated

sys.path.insert(0, str(Path(__file__).parent))
from bigram import BigramLoop, experience, updates


def test_importances_by_hand() -> None:
    """max(omega, 0) / (move^2 + xi), xi in units of the mean squared move, scaled to mean 1."""
    path, moved = torch.tensor([2.0, -1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    raw = torch.tensor([2 / 1.05, 0.0, 1 / 0.05, 0.0])  # mean squared move 0.5, damping 0.1
    torch.testing.assert_close(consolidated(path, moved, 0.1), raw / raw.mean())


def test_an_update_that_did_not_move_has_no_importance() -> None:
    """Zero over zero is zero, not NaN."""
    assert (consolidated(torch.zeros(4), torch.zeros(4), 0.1) == 0).all()


def test_the_path_integral_is_the_fall_of_the_loss() -> None:
    """With small steps on all data, the parameters' contributions add up to what the loss fell by."""
    loop = BigramLoop({"new": experience(1)["new"][:6]}, 1)
    (si,) = build([catalog.SynapticIntelligence()])
    si.before_training_exp(loop)
    before = float(loop.loss(loop.adapter.flat, loop.items["new"]))
    for _ in range(200):
        loop.adapter.gradient.copy_(loop.gradient_of(loop.items["new"]))
        si.after_backward(loop)
        loop.adapter.flat -= 0.02 * loop.adapter.gradient
        si.after_training_iteration(loop)
    fallen = before - float(loop.loss(loop.adapter.flat, loop.items["new"]))
    assert float(si.path.sum()) == pytest.approx(fallen, rel=0.02)


def test_the_penalty_is_not_part_of_the_path() -> None:
    """The gradient that counts is the loss's own, before the penalty was added."""
    first, states = updates([catalog.SynapticIntelligence(strength=0.02)], 1)
    loop = BigramLoop(experience(2), 2, first.adapter.flat)
    (si,) = build([catalog.SynapticIntelligence(strength=5.0)])
    si.load_state(*states["si"])
    si.before_training_exp(loop)
    loop.adapter.flat += 0.1
    loop.adapter.gradient.fill_(0.5)
    si.after_backward(loop)
    pushed = loop.adapter.gradient - 0.5
    torch.testing.assert_close(pushed, 5.0 * states["si"][0]["importance"] * 0.1, rtol=1e-4, atol=1e-5)
    loop.adapter.flat -= 0.01
    si.after_training_iteration(loop)
    torch.testing.assert_close(si.path, torch.full((144,), 0.5 * 0.01), rtol=1e-3, atol=1e-6)
