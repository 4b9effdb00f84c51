"""DPO and KTO against numbers computed by TRL 0.11.4's own functions, and by hand; and in the real loop."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strategies.adapter import Adapter, load_adapter
from strategies.dataset import Item, batches, micro_batches
from strategies.forward import completion_logprobs, label_states
from strategies.preference import class_weights, dpo_loss, kto_loss, preference_losses
from strategies.request import Lora, Training
from strategies.template import Template, UpdateExperience
from strategies.token_loss import row_losses

PEERS = Path(__file__).resolve().parent.parent / ".venv-bench" / "bin" / "python"
CHOSEN, REJECTED = torch.tensor([-12.5, -30.0, -7.25, -101.0]), torch.tensor([-11.0, -45.5, -7.5, -88.0])
REFERENCE_CHOSEN = torch.tensor([-13.0, -29.0, -9.0, -97.5])
REFERENCE_REJECTED = torch.tensor([-12.25, -40.0, -6.0, -90.0])
POLICY, REFERENCE = torch.stack([CHOSEN, REJECTED], 1), torch.stack([REFERENCE_CHOSEN, REFERENCE_REJECTED], 1)


@pytest.mark.parametrize(
    ("beta", "smoothing", "expected"),
    [
        (0.1, 0.0, [0.73135, 0.493249, 0.543793, 1.005492]),
        (0.1, 0.2, [0.71635, 0.583249, 0.608793, 0.895492]),
        (0.5, 0.0, [0.898123, 0.100207, 0.179745, 2.811968]),
    ],
)
def test_dpo_is_trls(beta: float, smoothing: float, expected: list[float]) -> None:
    """The numbers of `DPOTrainer.dpo_loss` for the same log-probabilities."""
    torch.testing.assert_close(dpo_loss(POLICY, REFERENCE, beta, smoothing), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("weights", "divergence", "expected"),
    [
        ((1.0, 1.0), 0.0, [0.487503, 0.524979, 0.456361, 0.586618, 0.531209, 0.365864, 0.46257, 0.549834]),
        ((1.0, 1.0), 3.0, [0.562176, 0.598688, 0.531209, 0.65701, 0.456361, 0.299433, 0.389361, 0.475021]),
        ((1.5, 0.75), 3.0, [0.843265, 0.898031, 0.796814, 0.985516, 0.342271, 0.224575, 0.292021, 0.356266]),
    ],
)
def test_kto_is_trls(weights: tuple[float, float], divergence: float, expected: list[float]) -> None:
    """The numbers of `KTOTrainer.kto_loss`: liked answers first, z = beta KL."""
    policy, reference = torch.cat([CHOSEN, REJECTED]), torch.cat([REFERENCE_CHOSEN, REFERENCE_REJECTED])
    liked = torch.arange(8) < 4
    losses = kto_loss(policy, reference, liked, weights, beta=0.1, z=0.1 * divergence)
    torch.testing.assert_close(losses, torch.tensor(expected), atol=1e-5, rtol=0)


def test_losses_where_every_run_starts() -> None:
    """At the reference itself DPO costs log 2 and KTO half its weight, with a gradient towards what is preferred."""
    policy = REFERENCE.clone().requires_grad_()
    losses = dpo_loss(policy, REFERENCE)
    torch.testing.assert_close(losses.detach(), torch.full((4,), 2.0).log())
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    torch.testing.assert_close(gradient, torch.tensor([[-0.05, 0.05]]).expand(4, 2))
    single = REFERENCE[:, 0].clone().requires_grad_()
    losses = kto_loss(single, REFERENCE[:, 0], torch.tensor([True, True, False, False]), (1.0, 2.0))
    torch.testing.assert_close(losses.detach(), torch.tensor([0.5, 0.5, 1.0, 1.0]))
    (gradient,) = torch.autograd.grad(losses.sum(), single)
    torch.testing.assert_close(gradient, torch.tensor([-0.025, -0.025, 0.05, 0.05]))


@pytest.mark.parametrize("logprob", [-1e4, 1e4])
def test_extreme_log_probabilities_stay_finite(logprob: float) -> None:
    """Neither loss overflows, and a DPO pair that is hopelessly wrong still has its full gradient."""
    policy = torch.tensor([[logprob, -logprob]], requires_grad=True)
    losses = dpo_loss(policy, torch.zeros(1, 2)) + kto_loss(
        policy[:, 0], torch.zeros(1), torch.tensor([True]), (1.0, 1.0)
    )
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


def test_classes_are_balanced_over_the_run() -> None:
    """Whatever the counts, likes and dislikes weigh the same in total, and an example weighs 1 on average."""
    liked, disliked = class_weights([True] * 9 + [False] * 3)
    assert 9 * liked == pytest.approx(3 * disliked) == pytest.approx(6)
    assert class_weights([True, True]) == class_weights([False]) == class_weights([]) == (1.0, 1.0)


def rated(seed: int, shape: str, label: bool | None = None) -> Item:
    """A random prompt of four tokens with a random answer of five, and another one for comparisons."""
    drawn = torch.randint(3, 250, (14,), generator=torch.Generator().manual_seed(seed)).tolist()
    rejected = drawn[:4] + drawn[9:] if shape == "comparison" else None
    return Item(
        index=seed, role="new", shape=shape, update=1, tokens=drawn[:9], start=4, rejected=rejected, label=label
    )


@pytest.mark.parametrize("micro_batch_tokens", [20, 2000])
def test_the_loop_learns_what_is_preferred(tiny_base: Path, micro_batch_tokens: int) -> None:
    """After 40 steps chosen answers gained on rejected ones and liked on disliked; the cut changes nothing."""
    items = [rated(seed, "comparison") for seed in range(6)]
    items += [rated(seed, "boolean", label=seed % 3 > 0) for seed in range(10, 16)]
    adapter = load_adapter(tiny_base, Lora(rank=4, dropout=0.0), precision="float32")
    training = Training(
        learning_rate=5e-3, epochs=10, batch_examples=3, micro_batch_tokens=micro_batch_tokens, weight_decay=0.0
    )
    losses = preference_losses(items, beta=0.5)
    loop = Template(adapter=adapter, training=training, items={"new": items}, preference_losses=losses)
    before = completion_logprobs(adapter, items)
    loop.train(UpdateExperience(items, 1), eval_streams=[])
    gain = {item: logprobs - before[item] for item, logprobs in completion_logprobs(adapter, items).items()}
    margins = torch.stack([gain[item][0] - gain[item][1] for item in items[:6]])
    assert (margins > 0).all()
    liked = [gain[item][0] for item in items if item.label is True]
    disliked = [gain[item][0] for item in items if item.label is False]
    assert min(liked) > max(disliked)
    assert loop.position.losses[0][1] == pytest.approx(loss_at_the_reference(items), rel=1e-4)


def loss_at_the_reference(items: list[Item]) -> float:
    """Of the first batch of three: log 2 for a comparison, half the class weight for a rating, mean over the items."""
    weights = class_weights(bool(item.label) for item in items if item.shape == "boolean")
    first = batches(items, 3, seed=0, epoch=0)[0]
    values = [math.log(2) if item.shape == "comparison" else weights[0 if item.label else 1] / 2 for item in first]
    return sum(values) / len(values)


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="no TRL: `make test-trl` installs it into .venv-bench")
def test_a_models_losses_are_what_trl_makes_of_its_log_probabilities(tiny_base: Path, tmp_path: Path) -> None:
    """TRL 1.16's trainers are told what our model says of every token, and compute the losses of our items from it."""
    pairs = [rated(seed, "comparison") for seed in range(6)]
    ratings = [rated(seed, "boolean", label=seed % 3 > 0) for seed in range(10, 16)]
    adapter = load_adapter(tiny_base, Lora(rank=4, dropout=0.0), precision="float32")
    adapter.assign(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    policy = completion_logprobs(adapter, [*pairs, *ratings])
    with adapter.disabled():
        reference = completion_logprobs(adapter, [*pairs, *ratings])
    told = {item: by_token(adapter, item) for item in (*pairs, *ratings)}
    given = {
        "beta": 0.2, "weights": class_weights(bool(item.label) for item in ratings),
        "comparisons": [
            {"chosen": told[item][0], "rejected": told[item][1], "reference": reference[item].tolist()}
            for item in pairs
        ],
        "ratings": [
            {"logprobs": told[item][0], "liked": item.label, "reference": float(reference[item][0])}
            for item in ratings
        ],
    }  # fmt: skip
    (tmp_path / "in.json").write_text(json.dumps(given))
    script = Path(__file__).with_name("trl_losses.py")
    subprocess.run([PEERS, script, tmp_path / "in.json", tmp_path / "out.json"], check=True, cwd=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    ours = preference_losses([*pairs, *ratings], beta=0.2)
    for name, shape, items in (("dpo", "comparison", pairs), ("kto", "boolean", ratings)):
        both = [torch.stack([each[item] for item in items]) for each in (policy, reference)]
        torch.testing.assert_close(torch.tensor(found[name]), ours[shape](*both, items), atol=1e-4, rtol=1e-4)
        assert max(found[name]) - min(found[name]) > 0.05


def by_token(adapter: Adapter, item: Item) -> list[list[float]]:
    """For each of an item's sequences what the model gives every token but the first; 0 where nothing is learned."""
    (micro,) = micro_batches([item], 4096)
    with torch.no_grad():
        losses = row_losses(label_states(adapter, micro), adapter.head, micro.targets)
    found = torch.zeros(len(micro.tokens), micro.tokens.shape[1] - 1)
    found.view(-1)[micro.rows - micro.owner] = -losses  # a row is counted in a table that is one token wider
    return found.tolist()


def test_losses_by_shape_use_the_right_columns() -> None:
    """`comparison` takes both columns, `boolean` the first and the items' labels, balanced over all items."""
    items = [rated(0, "boolean", True), rated(1, "boolean", True), rated(2, "boolean", False), rated(3, "comparison")]
    by_shape = preference_losses(items, beta=0.2)
    both: Tensor = by_shape["comparison"](POLICY, REFERENCE, items)
    torch.testing.assert_close(both, dpo_loss(POLICY, REFERENCE, 0.2))
    single = by_shape["boolean"](POLICY[:3], REFERENCE[:3], items[:3])
    liked = torch.tensor([True, True, False])
    torch.testing.assert_close(single, kto_loss(CHOSEN[:3], REFERENCE_CHOSEN[:3], liked, (0.75, 1.5), 0.2))
