"""Freezing and orthogonal slices in the real loop: what must not move does not, and what should move does."""

from pathlib import Path

import pytest
import torch

from strategies import catalog
from strategies.adapter import Adapter, load_adapter
from strategies.dataset import Item
from strategies.failure import Failure
from strategies.freeze import layer_of
from strategies.kronecker import layers_of
from strategies.olora import active_rows, overlap
from strategies.plugins import build
from strategies.request import Lora, Training
from strategies.template import Template, UpdateExperience


def texts(seed: int, count: int = 6) -> list[Item]:
    """Random texts of ten tokens."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 250, (count, 10), generator=draw).tolist()
    return [
        Item(index=place, role="new", shape="text", update=1, tokens=row, start=1) for place, row in enumerate(rows)
    ]


def trained(adapter: Adapter, strategies: list[catalog.Strategy], update: int = 1) -> Template:
    """One update with strong weight decay, which moves also what has no gradient."""
    training = Training(learning_rate=1e-2, weight_decay=0.1, epochs=3, batch_examples=2)
    items = {"new": texts(update), "replay": [], "memory": [], "general": []}
    loop = Template(adapter=adapter, training=training, items=items, learners=build(strategies), update=update)
    loop.train(UpdateExperience(items["new"], update), eval_streams=[])
    return loop


@pytest.fixture
def adapter(tiny_base: Path) -> Adapter:
    """Rank 4 on the tiny model's two layers, away from B = 0."""
    adapter = load_adapter(tiny_base, Lora(rank=4, alpha=8.0, dropout=0.0), precision="float32")
    adapter.assign(adapter.flat + 0.02 * torch.randn(len(adapter.flat), generator=torch.Generator().manual_seed(1)))
    return adapter


@pytest.mark.parametrize("others", [[], [catalog.Ewc(strength=5.0)]])
def test_the_bottom_layers_stay(adapter: Adapter, others: list[catalog.Strategy]) -> None:
    """Half of two layers: layer 0 keeps every bit against weight decay and EWC's pull, layer 1 learns."""
    names = dict(adapter.model.named_parameters())
    before = {name: leaf.detach().clone() for name, leaf in names.items() if "lora_" in name}
    loop = trained(adapter, [*others, catalog.Freeze(share=0.5)])
    trained(adapter, [*others, catalog.Freeze(share=0.5)], update=2)
    for name, value in before.items():
        assert torch.equal(names[name].detach(), value) == (layer_of(name) == 0)
    assert loop.position.counters["freeze"]["parameters"] == sum(
        value.numel() for name, value in before.items() if layer_of(name) == 0
    )


def test_the_backward_pass_ends_above_the_frozen_layers(adapter: Adapter) -> None:
    """While frozen, no gradient is asked of the lower layer's outputs; after the update everything can learn again."""
    asked: list[tuple[int | None, bool]] = []
    for name, module in adapter.model.named_modules():
        if hasattr(module, "lora_A"):
            place = layer_of(name)
            module.register_forward_hook(lambda _, __, out, place=place: asked.append((place, out.requires_grad)))
    trained(adapter, [catalog.Freeze(share=0.5)])
    assert (0, False) in asked
    assert (0, True) not in asked
    assert (1, True) in asked
    assert all(leaf.requires_grad for name, leaf in adapter.model.named_parameters() if "lora_" in name)


def test_names_of_other_families_are_numbered() -> None:
    """GPT-2's and MPT's names count layers too; embeddings have none."""
    assert layer_of("base_model.model.model.layers.12.mlp.up_proj.lora_A.default.weight") == 12
    assert layer_of("transformer.h.3.attn.c_attn.lora_B.default.weight") == 3
    assert layer_of("transformer.blocks.0.ffn.lora_B.default.weight") == 0
    assert layer_of("model.embed_tokens.weight") is None


def test_overlap_and_its_gradient_are_autograds() -> None:
    """sum |A P^T| and sign(A P^T) P."""
    draw = torch.Generator().manual_seed(0)
    A, past = torch.randn(2, 7, generator=draw, requires_grad=True), torch.randn(3, 7, generator=draw)
    value, slope = overlap(A.detach(), past)
    direct = sum((A[row] @ past[other]).abs() for row in range(2) for other in range(3))
    torch.testing.assert_close(value, direct.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(direct, A)[0])


def test_slices_take_turns() -> None:
    """Rank 8 in slices of 2 serves four updates; the fifth uses the first slice again. What does not fit is refused."""
    assert [active_rows(8, 2, update).start for update in range(1, 6)] == [0, 2, 4, 6, 0]
    for slice_rank in (3, 16):
        with pytest.raises(Failure, match=f"slice_rank {slice_rank} must divide the adapter's rank 8"):
            active_rows(8, slice_rank, 1)


def test_an_update_changes_its_own_slice_only(tiny_base: Path) -> None:
    """Two updates of a fresh adapter: each moves its rows of A and columns of B and leaves the other's bits alone."""
    adapter = load_adapter(tiny_base, Lora(rank=4, dropout=0.0), precision="float32")
    for update, own in ((1, slice(0, 2)), (2, slice(2, 4))):
        before = [(layer.A.clone(), layer.B.clone()) for layer in layers_of(adapter)]
        loop = trained(adapter, [catalog.OLora(slice_rank=2)], update)
        rest = slice(2, 4) if own.start == 0 else slice(0, 2)
        for layer, (A, B) in zip(layers_of(adapter), before, strict=True):
            assert torch.equal(layer.A[rest], A[rest])
            assert torch.equal(layer.B[:, rest], B[:, rest])
            assert not torch.equal(layer.B[:, own], B[:, own])
        assert loop.position.counters["olora"]["slice"] == update - 1
        assert (loop.position.counters["olora"]["overlap"] > 0) == (update == 2)


def test_the_term_makes_the_slices_orthogonal(tiny_base: Path) -> None:
    """The stronger the term, the less the second update's A reads what the first one's reads."""
    overlaps = []
    for strength in (0.0, 20.0):
        adapter = load_adapter(tiny_base, Lora(rank=4, dropout=0.0), precision="float32")
        for update in (1, 2):
            loop = trained(adapter, [catalog.OLora(slice_rank=2, strength=strength)], update)
        overlaps.append(loop.position.counters["olora"]["overlap"])
    assert overlaps[1] < 0.8 * overlaps[0]
