"""EWC on dW against dense computations: the penalty's value and gradient, the factors, and the factorisation of dW."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strategies import catalog
from strategies.adapter import Adapter, load_adapter
from strategies.dataset import Item
from strategies.kronecker import Factors, KroneckerConsolidation, Moments, factors, layers_of, merged, normalised, pull
from strategies.request import Lora, Training
from strategies.template import Template


def item(seed: int, tokens: int = 9) -> Item:
    """A text of random tokens."""
    drawn = torch.randint(3, 250, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Item(index=seed, role="new", shape="text", update=1, tokens=drawn, start=1)


@pytest.fixture
def adapter(tiny_base: Path) -> Adapter:
    """Rank 3 on all linear layers of the tiny model, away from B = 0."""
    adapter = load_adapter(tiny_base, Lora(rank=3, alpha=6.0, dropout=0.0), precision="float32")
    noise = torch.randn(len(adapter.flat), generator=torch.Generator().manual_seed(1))
    adapter.assign(adapter.flat + 0.05 * noise)
    return adapter


@pytest.fixture
def loop(adapter: Adapter) -> Template:
    """The real loop, with six new texts and three general ones."""
    items = {role: [] for role in ("replay", "memory", "heldout_new", "heldout_old", "eval")}
    items |= {"new": [item(seed) for seed in range(6)], "general": [item(seed) for seed in range(20, 23)]}
    return Template(adapter=adapter, training=Training(), items=items)


@pytest.fixture
def matrices() -> Iterator[Tensor]:
    """A, B, A*, B*, a, g of a layer with 7 inputs, 5 outputs and rank 2, in float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 7), (5, 2), (2, 7), (5, 2), (7,), (5,)]
    return iter([torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes])


def test_penalty_and_gradient_are_the_dense_ones(matrices: Iterator[Tensor]) -> None:
    """r x r traces give what the whole matrix dW gives, and autograd's gradient of it."""
    A, B, anchor_A, anchor_B, a, g = matrices
    A, B = A.requires_grad_(), B.requires_grad_()
    importance = Factors(a.square(), g.square(), 0.3)
    difference = 2.0 * (B @ A - anchor_B @ anchor_A)
    dense = 0.3 / 2 * (importance.g[:, None] * importance.a * difference**2).sum()
    value, d_A, d_B = pull(A.detach(), B.detach(), anchor_A, anchor_B, importance, 2.0)
    expected_A, expected_B = torch.autograd.grad(dense, (A, B))
    torch.testing.assert_close(value, dense.detach())
    torch.testing.assert_close(d_A, expected_A)
    torch.testing.assert_close(d_B, expected_B)


def test_nothing_pulls_at_the_anchor(matrices: Iterator[Tensor]) -> None:
    """Exactly zero, not the rounding error of two large terms."""
    A, B, _, _, a, g = (tensor.float() for tensor in matrices)
    value, d_A, d_B = pull(A, B, A.clone(), B.clone(), Factors(a.square(), g.square(), 1e6), 2.0)
    assert float(value) == float(d_A.abs().max()) == float(d_B.abs().max()) == 0.0


def test_the_penalty_does_not_depend_on_the_factorisation(matrices: Iterator[Tensor]) -> None:
    """B R^-1 and R A are the same dW and have the same penalty, which EWC on A and B does not see."""
    A, B, anchor_A, anchor_B, a, g = matrices
    R = torch.tensor([[2.0, 0.3], [-0.5, 0.1]], dtype=torch.float64)
    importance = Factors(a.square(), g.square(), 1.0)
    plain, *_ = pull(A, B, anchor_A, anchor_B, importance, 1.0)
    turned, *_ = pull(R @ A, B @ torch.linalg.inv(R), anchor_A, anchor_B, importance, 1.0)
    torch.testing.assert_close(plain, turned)


def test_merging_keeps_row_and_column_sums() -> None:
    """The merged rank-one importance has the marginal sums of the exact rank-two sum, decay included."""
    draw = torch.Generator().manual_seed(3)
    matrices = [torch.rand(5, 7, generator=draw) for _ in range(2)]
    past, new = (factors(matrix.sum(0), matrix.sum(1)) for matrix in matrices)
    both = merged(past, new, 0.5)
    exact = 0.5 * matrices[0] + matrices[1]
    kept = both.c * both.g[:, None] * both.a
    torch.testing.assert_close(kept.sum(0), exact.sum(0))
    torch.testing.assert_close(kept.sum(1), exact.sum(1))


def test_importances_of_nothing_are_zero() -> None:
    """A layer that no gradient reaches is free; so is a model without any gradient."""
    (only,) = normalised([factors(torch.zeros(4), torch.zeros(3))])
    assert only.c == 0
    assert merged(only, only, 0.5).c == 0
    assert only.g.isfinite().all()


def test_a_token_without_gradient_counts_for_nothing(loop: Template) -> None:
    """However large its inputs are: the first token has some thousands of times those of the others."""
    moments = Moments(layers_of(loop.adapter))
    x, gradient = torch.ones(3, len(moments.inputs[0])), torch.ones(3, len(moments.outputs[0]))
    x[0], gradient[0] = 1e4, 0.0
    moments._add(0, x, gradient)
    found = moments.factors(1)[0]
    assert found.c == pytest.approx(2.0)
    torch.testing.assert_close(found.a, torch.ones_like(found.a))


def test_factors_have_the_row_and_column_sums_of_the_tokens_fisher(loop: Template, adapter: Adapter) -> None:
    """For every layer: sums of the dense mean over examples of sum_t (dL/dy_ti x_tj)^2, by autograd."""
    layers = layers_of(adapter)
    moments = Moments(layers)
    with moments.watching():
        for text in loop.items["new"]:
            loop.gradient_of([text])
    found = moments.factors(6)
    inputs: list[list[Tensor]] = [[] for _ in layers]
    outputs: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        layer.module.register_forward_hook(
            lambda _, x, y, place=place: (inputs[place].append(x[0][0]), y.retain_grad(), outputs[place].append(y))[-1]
        )
        for place, layer in enumerate(layers)
    ]
    for text in loop.items["new"]:
        tokens = torch.tensor([text.tokens])
        logits = adapter.model(input_ids=tokens).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).backward()
    for hook in hooks:
        hook.remove()
    for place, importance in enumerate(found):
        pairs = zip(inputs[place], outputs[place], strict=True)
        dense = torch.stack([y.grad[0].square().T @ x.detach().square() for x, y in pairs]).mean(0)
        kept = importance.c * importance.g[:, None] * importance.a
        torch.testing.assert_close(kept.sum(0), dense.sum(0), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(kept.sum(1), dense.sum(1), rtol=1e-3, atol=1e-7)


def test_importances_follow_the_exact_per_example_ones(loop: Template, adapter: Adapter) -> None:
    """c g a^T correlates with the true mean squared per-example gradient of dW, whose size it has within a factor 3."""
    layers = layers_of(adapter)
    moments = Moments(layers)
    with moments.watching():
        for text in loop.items["new"]:
            loop.gradient_of([text])
    layer, importance = layers[0], moments.factors(6)[0]
    weight = layer.module.base_layer.weight.requires_grad_()
    squares = []
    for text in loop.items["new"]:
        tokens = torch.tensor([text.tokens])
        layer.module.forward = lambda x: layer.module.base_layer(x) + 2.0 * x @ layer.A.T @ layer.B.T
        loss = torch.nn.functional.cross_entropy(adapter.model(input_ids=tokens).logits[0, :-1], tokens[0, 1:])
        squares.append(torch.autograd.grad(loss, weight)[0] ** 2)
    exact = torch.stack(squares).mean(0)
    ours = importance.c * importance.g[:, None] * importance.a
    assert 1 / 3 < float(ours.mean() / exact.mean()) < 3
    assert float(torch.corrcoef(torch.stack([ours.flatten(), exact.flatten()]))[0, 1]) > 0.4


def test_the_loop_gets_the_penaltys_gradient(loop: Template, adapter: Adapter) -> None:
    """Away from the anchor every layer's gradient gets lambda times its pull, and the state comes back bit for bit."""
    learner = KroneckerConsolidation(catalog.Kronecker(strength=0.5))
    learner.before_training_exp(loop)
    learner.after_backward(loop)
    assert (adapter.gradient == 0).all()  # no past yet
    learner.after_training_exp(loop)
    tensors, notes = learner.state()
    second = KroneckerConsolidation(catalog.Kronecker(strength=0.5))
    second.load_state(tensors, notes)
    second.before_training_exp(loop)
    assert notes == {"updates": 1} == second.state()[1]
    assert all(torch.equal(tensor, second.state()[0][name]) for name, tensor in tensors.items())
    adapter.assign(adapter.flat + 0.01)
    adapter.gradient.zero_()
    second.after_backward(loop)
    layer = layers_of(adapter)[3]
    _, d_A, d_B = pull(layer.A, layer.B, layer.A - 0.01, layer.B - 0.01, second.importances[3], layer.scaling)
    torch.testing.assert_close(layer.slope_a, 0.5 * d_A, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(layer.slope_b, 0.5 * d_B, rtol=1e-3, atol=1e-6)
    assert loop.position.counters["kronecker"]["penalty"] > 0


def test_a_fresh_adapter_is_held_to_the_base(tiny_base: Path, loop: Template) -> None:
    """At B = 0 the gradient of A vanishes; dW's importance does not, so the pre-training anchor holds at once."""
    fresh = load_adapter(tiny_base, Lora(rank=3, dropout=0.0), precision="float32")
    own = Template(adapter=fresh, training=Training(), items=loop.items)
    learner = KroneckerConsolidation(catalog.Kronecker(general=1.0))
    learner.before_training_exp(own)
    assert min(importance.c for importance in learner.importances) > 0
    fresh.assign(fresh.flat + 0.01)
    learner.after_backward(own)
    assert all(float(layer.slope_a.norm()) > 0 and float(layer.slope_b.norm()) > 0 for layer in layers_of(fresh))


def test_state_is_small_beside_the_anchor(loop: Template) -> None:
    """Two vectors of a layer's sides instead of one as long as the adapter, and no more after ten updates."""
    learner = KroneckerConsolidation(catalog.Kronecker())
    sizes = []
    for _ in range(3):
        learner.after_training_exp(loop)
        sizes.append(sum(tensor.nbytes for tensor in learner.state()[0].values()))
    anchor = learner.state()[0]["mean"].nbytes
    assert sizes[0] == sizes[2] < 1.6 * anchor
