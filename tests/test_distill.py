"""Distillation against the dense KL over the whole vocabulary and against the K + 1 buckets computed directly."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strategies import catalog
from strategies.adapter import load_adapter
from strategies.dataset import Item, MicroBatch, batches, micro_batches
from strategies.derpp import Answers
from strategies.distill import Distillation, HeldRows, anchored, divergence
from strategies.request import Lora, Training
from strategies.template import Template


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A teacher's most likely tokens and their log-probabilities."""
    logprobs, tokens = logits.log_softmax(-1).topk(count)
    return tokens, logprobs


def buckets(p: Tensor, tokens: Tensor) -> Tensor:
    """(rows, vocabulary) -> (rows, K + 1) probabilities, in float64."""
    chosen = p.gather(-1, tokens)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Teacher's and model's logits: (5 rows, 40 tokens)."""
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(5, 40, generator=generator), 3 * torch.randn(5, 40, generator=generator)


def test_whole_vocabulary_is_the_dense_kl(pair: tuple[Tensor, Tensor]) -> None:
    """With K = the vocabulary the divergence and its gradient are those of torch's own KL."""
    teacher, model = pair
    model.requires_grad_()
    value = divergence(model, *top(teacher, 40), temperature=1.0)
    dense = torch.nn.functional.kl_div(
        model.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(value, dense)
    (ours,) = torch.autograd.grad(value.sum(), model)
    torch.testing.assert_close(ours, model.softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_top_and_rest_is_the_kl_of_the_buckets(pair: tuple[Tensor, Tensor], temperature: float) -> None:
    """Top K and the rest: T^2 KL of the two bucketed, tempered distributions."""
    teacher, model = pair
    tokens, logprobs = top(teacher, 6)
    p = buckets(teacher.double().softmax(-1), tokens) ** (1 / temperature)
    q = buckets(model.double().softmax(-1), tokens) ** (1 / temperature)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    value = divergence(model, tokens, logprobs, temperature)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


def test_no_divergence_and_no_gradient_from_oneself(pair: tuple[Tensor, Tensor]) -> None:
    """A model that says what its teacher says is not pushed anywhere."""
    model = pair[1].requires_grad_()
    value = divergence(model, *top(model.detach(), 8), temperature=2.0)
    (gradient,) = torch.autograd.grad(value.sum(), model)
    assert value.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("certainty", [20.0, 60.0, 200.0])
def test_certain_teachers_and_models_stay_finite(certainty: float) -> None:
    """Probabilities that round to 0 or 1 on either side give finite values and gradients."""
    sure, other = torch.zeros(1, 10), torch.zeros(1, 10)
    sure[0, 3], other[0, 4] = certainty, certainty
    for teacher, logits in [(sure, other), (other, sure), (sure, sure), (sure, torch.zeros(1, 10))]:
        model = logits.clone().requires_grad_()
        value = divergence(model, *top(teacher, 2), temperature=1.0)
        (gradient,) = torch.autograd.grad(value.sum(), model)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient.abs().max() <= 1 + 1e-6


def item(tokens: int) -> Item:
    """A text of so many tokens."""
    return Item(index=0, role="replay", shape="text", update=1, tokens=list(range(tokens)), start=1)


def micro_of(*items: Item) -> MicroBatch:
    """All items in one forward pass; longer ones come first."""
    (micro,) = micro_batches(items, 100)
    return micro


def test_row_term_holds_only_the_rows_that_have_a_teacher(pair: tuple[Tensor, Tensor]) -> None:
    """Chunks of label rows add up to weight x the divergence of the held item's rows; other rows get no gradient."""
    teacher, model = pair
    micro = micro_of(item(3), item(4))  # rows 0-2 held, rows 3-4 free
    tokens, logprobs = top(teacher[:3], 6)
    term = HeldRows(micro, [Answers(0.0, tokens.int(), logprobs), None], [0.25, 9.0])
    model.requires_grad_()
    value = term(model[0:2], slice(0, 2)) + term(model[2:5], slice(2, 5))
    torch.testing.assert_close(value, 0.25 * divergence(model[:3], tokens, logprobs, 1.0).sum())
    (gradient,) = torch.autograd.grad(value, model)
    assert (gradient[3:] == 0).all()
    assert (gradient[:3].abs().sum(-1) > 0).all()


def test_a_teacher_of_other_rows_is_refused() -> None:
    """Answers that do not belong to the item are an error, not a silent shift of rows."""
    answers = Answers(0.0, torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="3 label rows are held, their teacher has 2"):
        HeldRows(micro_of(item(4)), [answers], [1.0])


def test_buckets_bound_the_dense_kl_from_below(pair: tuple[Tensor, Tensor]) -> None:
    """Coarser distributions differ less: K = 1 <= K = 5 <= K = 20 <= the vocabulary."""
    teacher, model = pair
    values = [float(divergence(model, *top(teacher, count), temperature=1.0).sum()) for count in (1, 5, 20, 40)]
    assert values == sorted(values)
    assert not math.isclose(values[0], values[-1])


def test_anchors_are_held_and_not_learned(tiny_base: Path) -> None:
    """With anchors in the batch the answers' loss is what it is without them; the anchors add their mean divergence."""
    adapter = load_adapter(tiny_base, Lora(rank=2, dropout=0.0), precision="float32")
    answer, anchor = item(3), replace(item(6), is_anchor=True)
    adapter.assign(torch.randn(len(adapter.flat), generator=torch.Generator().manual_seed(5)) * 0.05)

    def gradient(items: list[Item], learners: list[Distillation]) -> Tensor:
        loop = Template(adapter=adapter, training=Training(), items={"general": [anchor]}, learners=learners)
        for learner in learners:
            learner.before_training_exp(loop)
        loop.step_items = items
        adapter.gradient.zero_()
        loop._accumulate()
        return adapter.gradient.clone()

    alone = gradient([answer], [])
    held = gradient([anchor], [Distillation(catalog.Distill(on="general"))])
    assert held.norm() > 0
    both = gradient([answer, anchor], [Distillation(catalog.Distill(on="general"))])
    torch.testing.assert_close(both, alone + held, rtol=1e-4, atol=1e-7)


def test_general_text_is_an_anchor_only_where_it_is_held() -> None:
    """`anchor_only` marks sequences, and nothing where distill holds other rows or is to learn them."""
    general = [item(4), replace(item(4), shape="boolean", label=True)]
    assert [each.is_anchor for each in anchored(general, [catalog.Distill(on="general")])] == [True]
    for other in (catalog.Replay(), catalog.Distill(on="replay"), catalog.Distill(anchor_only=False)):
        assert anchored(general, [other]) == general


def test_anchors_are_spread_over_the_batches() -> None:
    """Four anchors among twelve answers: one in every batch of four, in every epoch."""
    items = [item(3) for _ in range(12)] + [replace(item(5), is_anchor=True) for _ in range(4)]
    for epoch in range(5):
        cut = batches(items, 4, seed=1, epoch=epoch)
        assert [sum(each.is_anchor for each in batch) for batch in cut] == [1, 1, 1, 1]
        assert sorted(map(id, (each for batch in cut for each in batch))) == sorted(map(id, items))
