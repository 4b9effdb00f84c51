"""Every method of the catalog in the real loop on the tiny model: two updates, from memory and from files."""

from pathlib import Path

import pytest
import torch

from buffers.experience import Role
from strategies import catalog, checkpoint
from strategies.adapter import Adapter, load_adapter
from strategies.dataset import Item
from strategies.learner import Learner
from strategies.plugins import build
from strategies.request import Lora, Training
from strategies.template import Template, UpdateExperience

LORA = Lora(rank=4, alpha=8.0, dropout=0.1)


def texts(role: Role, update: int, count: int) -> list[Item]:
    """Random texts of eight to eleven tokens that only this update has."""
    draw = torch.Generator().manual_seed(50 + update)
    rows = torch.randint(3, 250, (count, 11), generator=draw).tolist()
    return [
        Item(index=1000 * update + place, role=role, shape="text", update=update, tokens=row[: 8 + place % 4], start=1)
        for place, row in enumerate(rows)
    ]


def one_update(adapter: Adapter, learners: list[Learner], update: int) -> Template:
    """A run over new, replayed and general rows, with memories of every past update."""
    past = range(1, update)
    items: dict[Role, list[Item]] = {
        "new": texts("new", update, 6),
        "replay": [item for number in past for item in texts("replay", number, 6)[:2]],
        "memory": [item for number in past for item in texts("memory", number, 6)[:3]],
        "general": texts("general", 0, 3),
    }
    torch.manual_seed(update)  # dropout
    training = Training(learning_rate=5e-3, epochs=2, batch_examples=4, micro_batch_tokens=40)
    loop = Template(adapter=adapter, training=training, items=items, learners=learners, update=update, seed=update)
    trained = [*items["new"], *items["replay"], *items["general"]]
    loop.train(UpdateExperience(trained, update), eval_streams=[])
    return loop


def fresh(tiny_base: Path) -> Adapter:
    """A new adapter on the tiny model; always the same."""
    return load_adapter(tiny_base, LORA, precision="float32")


STRATEGIES: dict[str, catalog.Strategy] = {name: struct() for name, struct in catalog.BY_NAME.items()}
STRATEGIES |= {
    "ewc": catalog.Ewc(general=0.5, samples=4),
    "kronecker": catalog.Kronecker(general=0.5, samples=4),
    "gem": catalog.Gem(refresh_steps=2),
    "avalanche": catalog.Avalanche(parameters={"gamma": 0.5}),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_second_update_from_files_equals_one_from_memory(name: str, tiny_base: Path, tmp_path: Path) -> None:
    """Adapter and state of update 1 on disk are all that update 2 needs: its weights are the same bit for bit."""
    first = fresh(tiny_base)
    learners = build([STRATEGIES[name]])
    one_update(first, learners, 1)
    first.save(tmp_path / "adapter")
    checkpoint.save_states(tmp_path / "strategy", learners)
    second = fresh(tiny_base)
    second.load(tmp_path / "adapter")
    reloaded = build([STRATEGIES[name]])
    checkpoint.load_states(tmp_path / "strategy", reloaded)
    from_files = one_update(second, reloaded, 2)
    from_memory = one_update(first, learners, 2)
    assert torch.equal(second.flat, first.flat)
    assert from_files.position.counters == from_memory.position.counters
    assert from_files.position.counters[name]


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_base_model_stays_and_the_update_learns(name: str, tiny_base: Path) -> None:
    """Two updates move the adapter and nothing else, and lower the loss of what was new."""
    adapter = fresh(tiny_base)
    frozen = {key: leaf.clone() for key, leaf in adapter.model.named_parameters() if "lora_" not in key}
    learners = build([STRATEGIES[name]])
    one_update(adapter, learners, 1)
    loop = one_update(adapter, learners, 2)
    assert adapter.is_finite()
    assert not torch.equal(adapter.flat, loop.start)
    assert all(torch.equal(leaf, frozen[key]) for key, leaf in adapter.model.named_parameters() if key in frozen)
    assert loop.position.losses[-1][1] < loop.position.losses[0][1] + 0.05


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 5000])
def test_fisher_information_is_that_of_single_examples(tiny_base: Path, micro_batch_tokens: int) -> None:
    """The mean of the squares of per-example gradients by autograd, however the forward passes are cut."""
    adapter = fresh(tiny_base)
    adapter.assign(adapter.flat + 0.05 * torch.randn(len(adapter.flat), generator=torch.Generator().manual_seed(2)))
    items = texts("new", 1, 5)
    training = Training(micro_batch_tokens=micro_batch_tokens, batch_examples=max(micro_batch_tokens // 100, 1))
    loop = Template(adapter=adapter, training=training, items={"new": items})
    adapter.gradient.fill_(7.0)
    found = loop.per_example_squared_gradients(items)
    assert (adapter.gradient == 7.0).all()
    squares = torch.zeros_like(adapter.flat)
    for item in items:
        tokens = torch.tensor([item.tokens])
        adapter.gradient.zero_()
        adapter.model(input_ids=tokens, labels=tokens).loss.backward()
        squares += adapter.gradient**2 / len(items)
    torch.testing.assert_close(found, squares, rtol=1e-3, atol=1e-9)
    batch = loop.gradient_of(items) ** 2
    assert float(batch.sum()) < 0.7 * float(found.sum())  # what squaring a batch's gradient would have lost
