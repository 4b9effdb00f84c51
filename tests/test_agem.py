"""A-GEM's projection against its formula."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.agem import project
from strategies.gem import dots
from strategies.gem import project as project_gem


@given(seed=st.integers(0, 2**32))
def test_projection_is_the_formula_and_gem_with_one_constraint(seed: int) -> None:
    """g - (g . r / r . r) r where g . r < 0; otherwise g stays."""
    g, reference = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    projected = project(g, reference)
    by_gem = project_gem(g, reference[None], dots(reference[None], reference[None]))
    if g @ reference >= 0:
        assert projected is None
        assert by_gem is None
    else:
        assert projected is not None
        torch.testing.assert_close(projected, g - (g @ reference) / (reference @ reference) * reference)
        torch.testing.assert_close(projected, by_gem)
        assert abs(float(projected @ reference)) < 1e-12 * float(g.norm() * reference.norm())


@given(seed=st.integers(0, 2**32), strength=st.floats(0.01, 2.0))
def test_strength_is_gems_with_one_constraint(seed: int, strength: float) -> None:
    """g + max(gamma, -g . r / r . r) r."""
    g, reference = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, by_gem = (
        project(g, reference, strength),
        project_gem(g, reference[None], dots(reference[None], reference[None]), strength),
    )
    assert found is not None
    assert by_gem is not None
    needed = max(strength, float(-(g @ reference) / (reference @ reference)))
    torch.testing.assert_close(found, g + needed * reference)
    torch.testing.assert_close(found, by_gem, atol=1e-5, rtol=1e-5)


def test_a_memory_without_gradient_constrains_nothing() -> None:
    """A zero reference gradient must not divide by zero."""
    assert project(torch.ones(4), torch.zeros(4)) is None


def test_the_gradient_itself_is_not_changed() -> None:
    """The caller decides where the result goes."""
    g = torch.tensor([1.0, -1.0])
    project(g, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(g, torch.tensor([1.0, -1.0]))
