"""What sequences have in common is computed once, with the answers of sequences that were computed alone."""

from pathlib import Path

import pytest
import torch

from strategies.adapter import Adapter, load_adapter
from strategies.prefix import common_prefix
from strategies.request import Lora

COMMON = 11


@pytest.fixture(params=["float32", "bfloat16"])
def adapter(tiny_base: Path, request: pytest.FixtureRequest) -> Adapter:
    """An adapter that says something."""
    made = load_adapter(tiny_base, Lora(rank=4, alpha=8.0, dropout=0.3), precision=request.param)
    made.assign(torch.randn(made.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return made


def batch(lengths: list[int], common: int = COMMON) -> torch.Tensor:
    """(sequences, length) that begin with the same tokens, padded."""
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, 250, (len(lengths), max(lengths)), generator=draw)
    tokens[:, :common] = tokens[0, :common].clone()
    if common < max(lengths):
        tokens[:, common] = torch.arange(3, 3 + len(lengths))  # from here on all differ
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
    return tokens


@pytest.mark.parametrize("lengths", [[30, 30, 19, 12], [12, 12, 12], [40, 12]])
@pytest.mark.parametrize("enabled", [True, False])
def test_states_are_those_of_sequences_alone(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch, lengths: list[int], enabled: bool
) -> None:
    """At every real token, for runs of equal and of different lengths; fewer tokens go through the layers."""
    tokens, embedded = batch(lengths), []
    embed = adapter.decoder.embed_tokens
    monkeypatch.setattr(
        embed, "forward", lambda ids: embedded.append(len(ids)) or torch.nn.Embedding.forward(embed, ids)
    )
    adapter.state.enabled = enabled
    with torch.no_grad():
        shared = adapter.hidden(tokens, lengths).unflatten(0, tokens.shape)
        assert embedded == [COMMON + sum(length - COMMON for length in lengths)]
        for row, length in enumerate(lengths):
            alone = adapter.hidden(tokens[row : row + 1, :length])
            tolerance = 1e-5 if alone.dtype == torch.float32 else 5e-2
            torch.testing.assert_close(shared[row, :length], alone, atol=tolerance, rtol=tolerance)


def test_nothing_is_kept_where_nobody_asks_for_a_gradient(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation holds one layer at a time, not all of them."""
    kept: list[bool] = []
    engine = adapter._engine
    assert engine is not None
    whole = engine.forward
    monkeypatch.setattr(type(engine), "forward", lambda self, *given: kept.append(given[-1]) or whole(*given))
    with torch.no_grad():
        assert not adapter.hidden(batch([14, 14])).requires_grad
    assert adapter.hidden(batch([14, 14])).requires_grad
    assert kept == [False, True]


@pytest.mark.parametrize("lengths", [[30, 30, 19, 12], [12, 12, 12], [40, 12]])
@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients_are_those_of_the_padded_batch(adapter: Adapter, lengths: list[int], recomputes: bool) -> None:
    """Every token has a say, those of the beginning in each sequence: the sum of the sequences' own gradients."""
    tokens, draw = batch(lengths), torch.Generator().manual_seed(6)
    weights = torch.randn(*tokens.shape, 32, generator=draw)
    adapter.state.recomputes = recomputes
    expected = torch.zeros_like(adapter.gradient)
    for row, length in enumerate(lengths):
        with adapter.own_gradient() as gradient:
            (adapter.hidden(tokens[row : row + 1, :length]).float() * weights[row, :length]).sum().backward()
            expected += gradient
    with adapter.own_gradient() as gradient:
        hidden = adapter.hidden(tokens, lengths).unflatten(0, tokens.shape).float()
        sum((hidden[row, :length] * weights[row, :length]).sum() for row, length in enumerate(lengths)).backward()  # type: ignore[union-attr]
        error = (gradient - expected).norm() / expected.norm()
    assert error < (1e-5 if adapter._work.dtype == torch.float32 else 5e-2)


def test_dropout_is_shared_with_the_beginning(adapter: Adapter) -> None:
    """The gradient is that of the function that was computed: a step against it lowers it."""
    lengths = [14, 14, 13]

    def loss() -> torch.Tensor:
        torch.manual_seed(8)
        with adapter.dropping():
            return adapter.hidden(batch(lengths), lengths).float().square().sum()

    if adapter._work.dtype != torch.float32:
        return  # rounding is larger than the step
    adapter.gradient.zero_()
    before = loss()
    before.backward()
    with torch.no_grad():
        small = 1e-3 / float(adapter.gradient.norm())
        adapter.assign(adapter.flat - small * adapter.gradient)
        assert float(before - loss()) == pytest.approx(small * float(adapter.gradient.square().sum()), rel=0.05)


@pytest.mark.parametrize(
    ("lengths", "common", "expected"),
    [([30, 30], 25, 25), ([30, 30], 30, 29), ([30, 12], 20, 11), ([30, 30, 30], 5, None), ([30], 20, None),
     ([], 0, None), ([1, 30], 1, None)],
)  # fmt: skip
def test_a_prefix_is_shared_where_it_pays(lengths: list[int], common: int, expected: int | None) -> None:
    """A fifth of all tokens at least; every sequence keeps a token of its own; one sequence has nothing to share."""
    rows = [row[:length] for row, length in zip(batch(lengths, common), lengths, strict=True)] if lengths else []
    tokens = torch.cat([torch.zeros(0), *rows])
    found = common_prefix(tokens, lengths)
    assert (None if found is None else found.length) == expected
    if found is not None:
        assert torch.equal(tokens[found.chosen][found.places], tokens)
