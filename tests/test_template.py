"""The training loop: exact gradients whatever the cut, events for plugins, refusals."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.adapter import Adapter, load_adapter
from strategies.dataset import Item, MicroBatch, micro_batches
from strategies.failure import Failure
from strategies.forward import label_states, token_losses
from strategies.lean_avalanche import SupervisedPlugin
from strategies.learner import Learner, Loop, RowTerm
from strategies.request import Lora, Training
from strategies.template import Events, Template, UpdateExperience, schedule, trainable
from strategies.token_loss import Head, row_losses, token_loss

LENGTHS = [9, 31, 17, 5, 24, 12, 40, 8]


def make_items(lengths: Sequence[int] = LENGTHS, **fields: Any) -> list[Item]:
    """Random tokens; the loss is on the later two thirds."""
    draw = torch.Generator().manual_seed(4)
    return [
        Item(**{"index": index, "role": "new", "shape": "demonstration", "update": 1, "start": max(length // 3, 1),
                "tokens": torch.randint(3, 250, (length,), generator=draw).tolist(), **fields})
        for index, length in enumerate(lengths)
    ]  # fmt: skip


@pytest.fixture
def adapter(tiny_base: Path) -> Adapter:
    """An adapter that says something (B is not zero)."""
    made = load_adapter(tiny_base, Lora(rank=4, alpha=8.0, dropout=0.0), precision="float32")
    made.assign(torch.randn(made.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return made


def make_loop(adapter: Adapter, **changes: Any) -> Template:
    """A loop over two epochs in batches of four."""
    training = Training(**{"epochs": 2, "batch_examples": 4, "learning_rate": 1e-2, **changes.pop("training", {})})
    return Template(**{"adapter": adapter, "training": training, "items": {"new": make_items()}, "seed": 3, **changes})


def padded_gradient(adapter: Adapter, items: Sequence[Item]) -> Tensor:
    """The textbook: one padded batch, all logits, transformers' own loss; (parameters,)."""
    length = max(len(item.tokens) for item in items)
    tokens = torch.tensor([[*item.tokens, *[0] * (length - len(item.tokens))] for item in items])
    mask = torch.tensor([[1] * len(item.tokens) + [0] * (length - len(item.tokens)) for item in items])
    labels = tokens.masked_fill(mask == 0, -100)
    for row, item in zip(labels, items, strict=True):
        row[: item.start] = -100
    with adapter.own_gradient() as gradient:
        adapter.model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        return gradient.clone()


@pytest.mark.parametrize("micro_batch_tokens", [1, 50, 64, 10_000])
def test_any_cut_gives_the_gradient_of_the_padded_batch(adapter: Adapter, micro_batch_tokens: int) -> None:
    """Bucketing, micro-batching, label rows and chunks change the memory, never the gradient."""
    loop = make_loop(adapter, training={"micro_batch_tokens": micro_batch_tokens})
    items = make_items()
    assert torch.allclose(loop.gradient_of(items), padded_gradient(adapter, items), atol=1e-6, rtol=1e-4)


def test_a_step_applies_the_clipped_gradient_with_adamw(adapter: Adapter) -> None:
    """One step equals torch's AdamW on the padded batch's gradient, clipped, at the scheduled rate."""
    items = make_items()
    start = adapter.flat.clone()
    expected = torch.nn.Parameter(start.clone())
    expected.grad = padded_gradient(adapter, items)
    assert float(expected.grad.norm()) > 0.1
    torch.nn.utils.clip_grad_norm_([expected], 0.1)
    torch.optim.AdamW([expected], lr=1e-2 * schedule(0, 1, 0.05), weight_decay=0.01).step()
    loop = make_loop(adapter, training={"epochs": 1, "batch_examples": 8, "clip_norm": 0.1})
    loop.train(UpdateExperience(items, 1), eval_streams=[])
    assert loop.step == 1
    assert torch.allclose(adapter.flat, expected, atol=1e-5)
    assert float((adapter.flat - start).abs().max()) > 1e-3


def test_training_lowers_the_loss_and_keeps_the_base(adapter: Adapter) -> None:
    """The items are learned; no weight of the base model moves."""
    items = make_items()
    base = {name: leaf.clone() for name, leaf in adapter.model.named_parameters() if not leaf.requires_grad}
    before = float(token_losses(adapter, items).mean())
    loop = make_loop(adapter, training={"epochs": 10, "learning_rate": 3e-2})
    loop.train(UpdateExperience(items, 1), eval_streams=[])
    assert float(token_losses(adapter, items).mean()) < before - 0.05
    assert loop.position.tokens == 10 * sum(LENGTHS)
    assert [step for step, _ in loop.position.losses] == list(range(1, 21))
    assert all(torch.equal(base[name], leaf) for name, leaf in adapter.model.named_parameters() if name in base)


def test_chunks_of_the_loss_equal_the_whole(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, rows and gradient do not depend on the chunk size, and equal torch's cross-entropy."""
    monkeypatch.setattr("strategies.token_loss.CHUNK_ROWS", 7)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 32, generator=draw).requires_grad_()
    targets = torch.randint(0, 259, (20,), generator=draw)
    plain = torch.nn.functional.cross_entropy(hidden @ adapter.head.weight.T, targets, reduction="none")
    (expected,) = torch.autograd.grad(plain.sum() * 0.3, hidden)
    loss, rows = token_loss(hidden, adapter.head, targets, 0.3)
    (found,) = torch.autograd.grad(loss, hidden)
    assert torch.allclose(rows, plain, atol=1e-5) and torch.allclose(found, expected, atol=1e-6)
    (again,) = torch.autograd.grad(row_losses(hidden, adapter.head, targets).sum() * 0.3, hidden)
    assert torch.allclose(again, expected, atol=1e-6)


def test_scaled_and_capped_heads_have_the_gradient_of_autograd() -> None:
    """Families that scale (Granite) or cap (Gemma) their logits learn with the right gradient."""
    draw = torch.Generator().manual_seed(0)
    head = Head(torch.randn(50, 8, generator=draw), scale=0.5, cap=3.0)
    hidden = torch.randn(9, 8, generator=draw).requires_grad_()
    targets = torch.randint(0, 50, (9,), generator=draw)
    logits = 3.0 * torch.tanh(hidden @ head.weight.T * 0.5 / 3.0)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), hidden)
    (found,) = torch.autograd.grad(token_loss(hidden, head, targets, 1 / 9)[0], hidden)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_row_term_adds_its_gradient(adapter: Adapter) -> None:
    """An extra loss on the logits acts as if it had been written into the loss."""
    (micro,) = micro_batches(make_items([9, 12]), 100)
    hidden = label_states(adapter, micro).detach().requires_grad_()

    def term(logits: Tensor, rows: slice) -> Tensor:
        return logits.logsumexp(-1).square().sum() * 0.01

    logits = hidden @ adapter.head.weight.T
    whole = torch.nn.functional.cross_entropy(logits, micro.targets, reduction="sum") * 0.1
    (expected,) = torch.autograd.grad(whole + term(logits, slice(None)), hidden)
    loss, _ = token_loss(hidden, adapter.head, micro.targets, 0.1, [term])
    (found,) = torch.autograd.grad(loss, hidden)
    assert torch.allclose(found, expected, atol=1e-6)


class Diary(Learner):
    """Writes down which events it was told of."""

    name = "diary"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def row_term(self, loop: Loop, micro: MicroBatch) -> RowTerm | None:
        self.events.append("row_term")
        return None

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("before_", "after_")) and "eval" not in name:
            events = object.__getattribute__(self, "events")
            if events[-1:] != [name]:  # avalanche asks for a callback twice before it calls it
                events.append(name)
        return object.__getattribute__(self, name)


def test_plugins_are_told_in_avalanches_order(adapter: Adapter) -> None:
    """One iteration is one optimiser step; forward passes are per micro-batch, the backward events once per step."""
    diary = Diary()
    items = make_items([8, 8, 8])
    training = {"epochs": 1, "batch_examples": 3, "micro_batch_tokens": 16}
    make_loop(adapter, learners=[diary], training=training).train(UpdateExperience(items, 1), eval_streams=[])
    step = diary.events[diary.events.index("before_training_iteration") :]
    assert step[: step.index("after_training_epoch")] == [
        "before_training_iteration",
        *["before_forward", "after_forward", "row_term"] * 2,
        "before_backward", "after_backward", "before_update", "after_update", "after_training_iteration",
    ]  # fmt: skip
    assert diary.events[-2:] == ["after_training_exp", "after_training"]


class Penalty(SupervisedPlugin[Any]):
    """A stock plugin's way of adding a loss, as Avalanche's EWC and LwF do."""

    def before_backward(self, strategy: Any, *_: Any, **__: Any) -> None:
        named = [leaf for leaf in strategy.model.parameters() if leaf.requires_grad]
        strategy.loss += 0.5 * sum((leaf**2).sum() for leaf in named)


def test_a_stock_plugin_may_add_to_the_loss(adapter: Adapter) -> None:
    """What an Avalanche plugin adds to `strategy.loss` reaches the flat gradient, once per step."""
    seen: list[Tensor] = []

    class Recorder(Learner):
        name = "recorder"

        def after_backward(self, strategy: Any, *_: Any, **__: Any) -> None:
            seen.append(strategy.adapter.gradient.clone())

    items, start = make_items(), adapter.flat.clone()
    plain = padded_gradient(adapter, items)
    training = {"epochs": 1, "batch_examples": 8, "micro_batch_tokens": 50}
    loop = make_loop(adapter, learners=[Recorder()], training=training)
    loop.plugins.insert(0, Penalty())
    loop.train(UpdateExperience(items, 1), eval_streams=[])
    assert torch.allclose(seen[0], plain + start, atol=1e-5)


def test_side_gradients_do_not_disturb_the_run(adapter: Adapter) -> None:
    """A method that computes gradients and teachers between steps leaves the run as it would be without."""

    class Curious(Learner):
        name = "curious"

        def after_backward(self, strategy: Any, *_: Any, **__: Any) -> None:
            strategy.gradient_of(make_items([7, 9]))
            strategy.per_example_squared_gradients(make_items([7]))
            strategy.teacher_top(make_items([7]), "previous", 5)
            strategy.teacher_top(make_items([7]), "base", 5)

    adapter.lora = Lora(rank=4, alpha=8.0, dropout=0.2)
    start, items, ends = adapter.flat.clone(), make_items(), []
    for learners in ([], [Curious()]):
        adapter.assign(start)
        torch.manual_seed(0)
        make_loop(adapter, learners=learners).train(UpdateExperience(items, 1), eval_streams=[])
        ends.append(adapter.flat.clone())
    assert torch.equal(*ends)


def test_squared_gradients_are_per_example(adapter: Adapter) -> None:
    """The mean of the squares, not the square of the mean."""
    items = make_items([9, 14, 6])
    loop = make_loop(adapter)
    expected = torch.stack([padded_gradient(adapter, [item]).square() for item in items]).mean(0)
    assert torch.allclose(loop.per_example_squared_gradients(items), expected, atol=1e-8, rtol=1e-3)


def test_teachers_are_the_base_and_the_starting_weights(adapter: Adapter) -> None:
    """`previous` stays what the run started from while the weights move on."""
    loop, items = make_loop(adapter), make_items([9, 14])
    logits = [adapter.head.logits(adapter.hidden(torch.tensor([item.tokens]))) for item in items]
    adapter.assign(adapter.flat * 3)
    for found, item, everything in zip(loop.teacher_top(items, "previous", 5), items, logits, strict=True):
        expected = everything[item.start - 1 : -1].log_softmax(-1).topk(5)
        assert torch.allclose(found.logprobs, expected.values, atol=1e-5)
        assert found.tokens.shape == (item.label_tokens, 5)
    with adapter.disabled():
        base = adapter.head.logits(adapter.hidden(torch.tensor([items[0].tokens]))).log_softmax(-1)
    (first, _) = loop.teacher_top(items, "base", 3)
    assert torch.allclose(first.logprobs, base[items[0].start - 1 : -1].topk(3).values, atol=1e-5)


def test_a_shape_selects_its_loss(adapter: Adapter) -> None:
    """Comparisons go to their preference loss with policy and reference; demonstrations keep the token loss."""
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(policy: Tensor, reference: Tensor, items: Sequence[Item]) -> Tensor:
        seen.append((policy.detach().clone(), reference.clone()))
        return -torch.nn.functional.logsigmoid((policy - reference) @ torch.tensor([1.0, -1.0]))

    comparison = make_items([10], shape="comparison", rejected=list(range(3, 15)))[0]
    items = [*make_items([9]), comparison]
    loop = make_loop(adapter, preference_losses={"comparison": loss}, training={"epochs": 3, "learning_rate": 3e-2})
    loop.train(UpdateExperience(items, 1), eval_streams=[])
    assert torch.allclose(*seen[0], atol=1e-4)
    margins = [float((policy - reference) @ torch.tensor([1.0, -1.0])) for policy, reference in seen]
    assert margins[-1] > margins[0] + 0.1
    assert loop.position.losses[-1][1] < loop.position.losses[0][1]


def test_preferences_without_a_loss_become_demonstrations() -> None:
    """What was preferred or liked is learned as it stands, what was disliked is left out."""
    liked, disliked = make_items([9], shape="boolean", label=True)[0], make_items([9], shape="boolean", label=False)[0]
    compared = make_items([9], shape="comparison", rejected=[3, 4, 5, 6])[0]
    found = trainable([liked, disliked, compared], {})
    assert [(item.shape, item.rejected, item.label) for item in found] == [("demonstration", None, None)] * 2


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    """Linear rise over the warm-up share, then a cosine that would reach 0 one step after the last."""
    factors = [schedule(step, 20, 0.2) for step in range(21)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1.0 and factors[12] == pytest.approx(0.5) and factors[20] == pytest.approx(0.0)
    assert schedule(0, 1, 0.05) > 0


def test_the_loop_stops_when_told(adapter: Adapter) -> None:
    """`stop` ends training after the epoch, with its reason."""
    events = Events(after_epoch=lambda loop: loop.stop("enough"))
    loop = make_loop(adapter, events=events, training={"epochs": 5})
    loop.train(UpdateExperience(make_items(), 1), eval_streams=[])
    assert (loop.step, loop.position.stopped_early) == (2, "enough")


def test_a_loss_that_is_not_finite_stops_at_once(adapter: Adapter) -> None:
    """The weights of the step before are not overwritten."""
    adapter.flat[0] = float("nan")
    adapter.refresh()
    with pytest.raises(Failure) as caught:
        make_loop(adapter).train(UpdateExperience(make_items(), 1), eval_streams=[])
    assert caught.value.code == "non_finite_loss" and "step 1" in caught.value.reason


def test_a_loss_that_no_parameter_reaches_is_a_failure(adapter: Adapter) -> None:
    """A run that would train nothing says so instead of publishing an unchanged adapter."""
    adapter.state.enabled = False
    with pytest.raises(Failure) as caught:
        make_loop(adapter).train(UpdateExperience(make_items(), 1), eval_streams=[])
    assert caught.value.code == "nothing_to_learn"


def test_losses_do_not_depend_on_the_batch(adapter: Adapter) -> None:
    """An item's evaluated loss is that of transformers on the item alone."""
    items = make_items()
    found = token_losses(adapter, items)
    for item, loss in zip(items, found.tolist(), strict=True):
        labels = torch.tensor([[-100] * item.start + list(item.tokens[item.start :])])
        with torch.no_grad():
            expected = adapter.model(input_ids=torch.tensor([item.tokens]), labels=labels).loss
        assert math.isclose(loss, float(expected), abs_tol=1e-5)
