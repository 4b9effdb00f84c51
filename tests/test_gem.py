"""GEM's projection against an enumeration of every active set, on random and adversarial memories."""

from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.gem import dots, multipliers, project


def by_enumeration(g: Tensor, memories: Tensor) -> Tensor:
    """The projection by trying all 2^T sets of active constraints: the feasible point closest to g (float64)."""
    g, memories = g.double(), memories.double()
    best, distance = None, torch.inf
    for size in range(len(memories) + 1):
        for chosen in combinations(range(len(memories)), size):
            rows = memories[list(chosen)]
            z = g + torch.linalg.pinv(rows) @ (-rows @ g) if size else g
            met = (memories @ z >= -1e-9 * (1 + g.norm()) * (1e-30 + memories.norm(dim=1))).all()
            if met and (z - g).norm() < distance:
                best, distance = z, float((z - g).norm())
    assert best is not None, "no feasible point"
    return best


def projected(g: Tensor, memories: Tensor, strength: float = 0.0) -> Tensor:
    """`project`, with g itself where nothing had to change."""
    changed = project(g, memories, dots(memories, memories), strength)
    return g if changed is None else changed


def assert_met(z: Tensor, g: Tensor, memories: Tensor, tolerance: float = 2e-6) -> None:
    """Every constraint holds to the tolerance, measured as a cosine in units of ||g||."""
    assert (memories.double() @ z.double() >= -tolerance * g.double().norm() * memories.double().norm(dim=1)).all()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), constraints=st.integers(1, 6), parameters=st.integers(2, 9))
def test_projection_is_the_closest_feasible_gradient(seed: int, constraints: int, parameters: int) -> None:
    """For random memories the result equals that of the enumeration of all active sets."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(parameters, generator=generator, dtype=torch.float64)
    memories = torch.randn(constraints, parameters, generator=generator, dtype=torch.float64)
    z = projected(g, memories)
    assert_met(z, g, memories)
    torch.testing.assert_close(z, by_enumeration(g, memories), atol=1e-4, rtol=1e-4)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kinds=st.lists(
        st.sampled_from(["new", "same", "nearly", "opposite", "zero", "sum", "tiny", "huge", "hair"]), max_size=7
    ),
    strength=st.sampled_from([0.0, 0.5]),
)
def test_adversarial_memories(seed: int, kinds: list[str], strength: float) -> None:
    """Duplicated, nearly equal, opposite, empty, dependent and badly scaled memories are all met, optimally (KKT)."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(12, generator=generator, dtype=torch.float64)
    rows = [first]
    for kind in kinds:
        fresh, last = torch.randn(12, generator=generator, dtype=torch.float64), rows[-1]
        choices = {
            "new": fresh, "same": last, "nearly": last + 1e-3 * last.norm() * fresh,
            "hair": last + 1e-7 * last.norm() * fresh, "opposite": -last,
            "zero": 0 * last, "sum": sum(rows[:-1], last), "tiny": 1e-12 * fresh, "huge": 1e12 * fresh,
        }  # fmt: skip
        rows.append(choices[kind])
    memories = torch.stack(rows)
    g = torch.randn(12, generator=generator, dtype=torch.float64) + strength * memories.sum(0)
    gram, slack, scale = dots(memories, memories), dots(memories, g[None])[:, 0], float(g.norm())
    v = multipliers(gram, slack, scale)
    z = g + v @ memories
    assert (v >= 0).all()
    assert_met(z, g, memories, 2e-5)
    active = v > 0  # complementary slackness: a constraint that pushes is met with equality
    assert ((memories @ z)[active].abs() <= 2e-5 * scale * memories.norm(dim=1)[active]).all()


def test_a_gradient_that_harms_no_memory_is_left_alone() -> None:
    """Without a violated constraint there is nothing to project, and the step costs one product only."""
    memories = torch.eye(3, 8)
    assert project(torch.ones(8), memories, dots(memories, memories)) is None


def test_one_constraint_is_the_formula_of_agem() -> None:
    """With a single memory GEM removes the component of g along it."""
    g, reference = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 3.0, 0.0])
    torch.testing.assert_close(projected(g, reference[None]), torch.tensor([1.0, 0.0, 0.5]))


def test_opposite_memories_leave_what_is_orthogonal_to_both() -> None:
    """Two memories that contradict each other allow no move along their axis at all."""
    memories = torch.tensor([[0.0, 1.0, 0.0], [0.0, -2.0, 0.0]])
    torch.testing.assert_close(projected(torch.tensor([1.0, -5.0, 2.0]), memories), torch.tensor([1.0, 0.0, 2.0]))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), constraints=st.integers(1, 6), strength=st.floats(0.01, 2.0))
def test_strength_bounds_the_multipliers_from_below(seed: int, constraints: int, strength: float) -> None:
    """The result is g + G^T v with the paper's v >= gamma: dual feasible, and exact where v leaves the bound (KKT)."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(20, generator=generator, dtype=torch.float64)
    memories = torch.randn(constraints, 20, generator=generator, dtype=torch.float64)
    z = projected(g, memories, strength)
    v = torch.linalg.lstsq(memories.T, (z - g)[:, None]).solution[:, 0]
    torch.testing.assert_close(g + v @ memories, z)
    assert (v >= strength - 1e-6).all()
    assert_met(z, g + strength * memories.sum(0), memories)
    assert ((memories @ z)[v > strength + 1e-6].abs() < 1e-4).all()


def test_strength_helps_a_memory_that_nothing_harms() -> None:
    """With a strength a step goes towards the memory even where it is not in its way; with 0 it is left alone."""
    g, memories = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(projected(g, memories, 0.5), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(projected(g, memories), g)


def test_float32_gradients_of_a_million_parameters() -> None:
    """The constraints hold to float32's precision at a realistic size, across the chunks of the products."""
    torch.manual_seed(2)
    shared = torch.randn(1_500_000)
    memories = torch.stack([shared + 0.5 * torch.randn(1_500_000) for _ in range(4)])
    g = -shared + torch.randn(1_500_000)
    assert (dots(memories, g[None]) < 0).all()
    z = projected(g, memories)
    assert_met(z, g, memories)
    assert (z - g).norm() < g.norm()
