"""Memory aware synapses: sensitivity by finite differences, and what it does not depend on."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from strategies import catalog
from strategies.mas import energy, sensitivity
from strategies.plugins import build

sys.path.insert(0, str(Path(__file__).parent))
from bigram import WORDS, BigramLoop, experience, items_of


def outputs(loop: BigramLoop, theta: torch.Tensor, words: list[int]) -> float:
    """Mean over rows of the squared length of the centred logits, in float64."""
    logits = (loop.base + theta.view(WORDS, WORDS))[torch.tensor(words)].double()
    return float((logits - logits.mean(-1, keepdim=True)).square().sum(-1).mean())


def test_sensitivity_is_the_mean_absolute_derivative() -> None:
    """Of each example's mean squared output, by central differences in all 144 parameters."""
    loop = BigramLoop(experience(1), 1, torch.randn(144, generator=torch.Generator().manual_seed(2)))
    items = loop.items["new"][:3]
    slopes = torch.zeros(3, 144)
    for place, item in enumerate(items):
        for index in range(144):
            nudge = torch.zeros(144)
            nudge[index] = 1e-2
            up, down = (outputs(loop, loop.adapter.flat + sign * nudge, list(item.tokens[:-1])) for sign in (1, -1))
            slopes[place, index] = (up - down) / 2e-2
    torch.testing.assert_close(sensitivity(loop, items), slopes.abs().mean(0), rtol=1e-2, atol=1e-3)


def test_labels_do_not_matter() -> None:
    """The last token of a text is only ever a label: another one gives the same importances."""
    loop = BigramLoop(experience(1), 1)
    item = items_of("new", 1, 1)[0]
    other = replace(item, tokens=[*item.tokens[:-1], (item.tokens[-1] + 1) % WORDS])
    assert torch.equal(sensitivity(loop, [item]), sensitivity(loop, [other]))


def test_a_shift_of_all_logits_does_not_count() -> None:
    """Adding a constant to every logit of a row says the same, and has the same energy."""
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(energy(logits, slice(0, 4)), energy(logits + 7.0, slice(0, 4)), rtol=1e-4, atol=1e-4)


def test_a_memorised_update_still_has_importances() -> None:
    """Where the loss and its gradient are nearly 0, the empirical Fisher information is too; the output is not."""
    item = replace(items_of("new", 1, 1)[0], tokens=[0, 1, 2, 3])
    theta = torch.zeros(WORDS, WORDS)
    theta[[0, 1, 2], [1, 2, 3]] = 40.0
    loop = BigramLoop({"new": [item]}, 1, theta.flatten())
    assert float(loop.per_example_squared_gradients([item]).max()) < 1e-20
    (mas,) = build([catalog.MemoryAwareSynapses()])
    mas.after_training_exp(loop)
    importance = mas.state()[0]["importance"].view(WORDS, WORDS)
    assert float(importance.mean()) > 0.99
    assert int(importance[0].argmax()) == 1
