"""Embedding noise: its size, and that only the training loss sees it."""

from pathlib import Path

import pytest
import torch
from torch.utils.hooks import RemovableHandle

from strategies import catalog
from strategies.adapter import load_adapter
from strategies.augment import noise
from strategies.dataset import Item
from strategies.learner import Learner, Loop
from strategies.plugins import build
from strategies.request import Lora, Training
from strategies.template import Template, UpdateExperience


@pytest.mark.parametrize("packed", [False, True])
def test_noise_is_bounded_and_smaller_for_longer_texts(packed: bool) -> None:
    """Uniform within alpha / sqrt(tokens x width) of each sequence's own length, padded or one after other."""
    torch.manual_seed(0)
    lengths = torch.tensor([100, 25])
    drawn = noise(torch.zeros(125, 32) if packed else torch.zeros(2, 100, 32), lengths, alpha=5.0)
    for row, tokens in zip(drawn.split([100, 25]) if packed else drawn, (100, 25), strict=True):
        bound = 5.0 / (tokens * 32) ** 0.5
        assert float(row.abs().max()) <= bound
        assert float(row.abs().max()) > 0.99 * bound
        assert float(row.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


class Listener(Learner):
    """Keeps what the embedding layer gave, in training and in a reference gradient."""

    name = "listener"

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[torch.Tensor] = []
        self.quiet: list[torch.Tensor] = []

    def before_training_iteration(self, strategy: Loop, *_: object, **__: object) -> None:
        """A reference gradient between the steps, as GEM takes it."""
        with self.listening(strategy, self.quiet):
            strategy.gradient_of(strategy.step_items)

    def before_forward(self, strategy: Loop, *_: object, **__: object) -> None:
        """Called after the noise has put itself in place."""
        self.hook = self.listening(strategy, self.trained)

    def after_forward(self, strategy: Loop, *_: object, **__: object) -> None:
        """The forward pass is over."""
        self.hook.remove()

    def listening(self, loop: Loop, heard: list[torch.Tensor]) -> RemovableHandle:
        """Append to `heard` until it is removed."""
        layer = loop.adapter.model.get_input_embeddings()
        return layer.register_forward_hook(lambda _, __, embedded: heard.append(embedded.detach().view(6, 32).clone()))


def test_only_the_training_loss_is_noisy(tiny_base: Path) -> None:
    """Each step's embeddings differ from the clean ones by other noise; reference gradients see the clean ones."""
    adapter = load_adapter(tiny_base, Lora(rank=2, dropout=0.0), precision="float32")
    item = Item(index=0, role="new", shape="text", update=1, tokens=[5, 6, 7, 8, 9, 10], start=1)
    listener = Listener()
    learners = [*build([catalog.Augment(noise=5.0)]), listener]
    loop = Template(adapter=adapter, training=Training(epochs=3), items={"new": [item]}, learners=learners)
    loop.train(UpdateExperience([item], 1), eval_streams=[])
    clean = adapter.model.get_input_embeddings()(torch.tensor(item.tokens))
    assert all(torch.equal(heard, clean) for heard in listener.quiet)
    assert len(listener.trained) == len(listener.quiet) == 3
    bound = 5.0 / (6 * 32) ** 0.5
    for heard in listener.trained:
        assert 0.5 * bound < float((heard - clean).abs().max()) <= bound * 1.0001
    assert not torch.equal(listener.trained[0], listener.trained[1])
    assert loop.position.counters["augment"]["noise"] == 5.0
