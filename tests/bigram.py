"""A bigram model with the interface of the training loop: whole runs of a method in milliseconds, in closed form.

It calls a method exactly as `strategies.learner` promises: load_state, before_training_exp, per step
before_training_iteration, row terms, after_backward, after_training_iteration, then after_training_exp and state.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from buffers.experience import Role
from strategies import catalog
from strategies.dataset import Item, micro_batches
from strategies.derpp import Answers
from strategies.learner import Learner, RowTerm, Teacher
from strategies.plugins import build

WORDS = 12
ROLES: tuple[Role, ...] = ("new", "replay", "memory", "general", "heldout_new", "heldout_old", "eval")


class BigramLoop:
    """logits(next | word) = (base + theta)[word]; theta: (WORDS * WORDS,) is the whole adapter. Steps are plain SGD."""

    def __init__(self, items: Mapping[Role, Sequence[Item]], update: int, theta: Tensor | None = None) -> None:
        start = torch.zeros(WORDS * WORDS) if theta is None else theta
        self.adapter = SimpleNamespace(flat=start.clone(), gradient=torch.zeros_like(start), refresh=lambda: None)
        self.base = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(99))
        self.frozen = self.base.clone()
        self.items = {role: list(items.get(role, ())) for role in ROLES}
        self.update, self.step, self.steps = update, 0, 12
        self.step_items: Sequence[Item] = ()
        self.generator = torch.Generator().manual_seed(update)
        self.start = start.clone()
        self.reports: dict[str, dict[str, float]] = {}

    def logits(self, theta: Tensor, tokens: Tensor) -> Tensor:
        """(n,) words -> (n, WORDS)"""
        return (self.base + theta.view(WORDS, WORDS))[tokens]

    def loss(self, theta: Tensor, items: Sequence[Item]) -> Tensor:
        """Mean loss of the label tokens of `items`."""
        pairs = [(item.tokens[place - 1], item.tokens[place])
                 for item in items for place in range(item.start, len(item.tokens))]  # fmt: skip
        words, following = torch.tensor(pairs).T
        return torch.nn.functional.cross_entropy(self.logits(theta, words), following)

    def gradient_of(self, items: Sequence[Item], term: RowTerm | None = None) -> Tensor:
        """By autograd at the current weights."""
        theta = self.adapter.flat.clone().requires_grad_()
        words = torch.tensor([word for item in items for word in item.tokens[item.start - 1 : -1]])
        loss = self.loss(theta, items) if term is None else term(self.logits(theta, words), slice(0, len(words)))
        return torch.autograd.grad(loss, theta)[0]

    def per_example_squared_gradients(self, items: Sequence[Item]) -> Tensor:
        """One backward pass per example."""
        return torch.stack([self.gradient_of([item]) ** 2 for item in items]).mean(0)

    def teacher_top(self, items: Sequence[Item], teacher: Teacher, top: int) -> list[Answers]:
        """Dense softmax, then the largest."""
        theta = {"base": torch.zeros_like(self.start), "previous": self.start, "current": self.adapter.flat}[teacher]
        rows = [torch.tensor(list(item.tokens[item.start - 1 : -1])) for item in items]
        tops = [self.logits(theta, words).log_softmax(-1).topk(min(top, WORDS)) for words in rows]
        return [Answers(0.0, found.indices, found.values) for found in tops]

    def report(self, name: str, key: str, value: float) -> None:
        """The last value stays."""
        self.reports.setdefault(name, {})[key] = float(value)

    def train(self, learners: Sequence[Learner], stop_before: int = 10**9) -> None:
        """The steps of a run from wherever it stands, and its end."""
        trained = [*self.items["new"], *self.items["replay"], *self.items["general"]]
        while self.step < min(self.steps, stop_before):
            order = torch.randperm(len(trained), generator=torch.Generator().manual_seed(self.step)).tolist()
            self.step_items = [trained[index] for index in order[:6]]
            for learner in learners:
                learner.before_training_iteration(self)
            self.adapter.gradient.copy_(self._batch_gradient(learners))
            for learner in learners:
                learner.after_backward(self)
            self.adapter.flat -= 2.0 * self.adapter.gradient
            self.step += 1
            for learner in learners:
                learner.after_training_iteration(self)
        if self.step == self.steps:
            for learner in learners:
                learner.after_training_exp(self)

    def _batch_gradient(self, learners: Sequence[Learner]) -> Tensor:
        theta = self.adapter.flat.clone().requires_grad_()
        loss = self.loss(theta, self.step_items)
        for micro in micro_batches(self.step_items, 24):
            words = micro.tokens.flatten()[micro.rows]
            terms = [learner.row_term(self, micro) for learner in learners]
            loss = loss + sum(term(self.logits(theta, words), slice(0, len(words))) for term in terms if term)
        return torch.autograd.grad(loss, theta)[0]


def items_of(role: Role, update: int, count: int) -> list[Item]:
    """`count` short texts that only this update has: its own part of the words, in its own order."""
    draw = torch.Generator().manual_seed(1000 * update)
    rows = torch.randint(WORDS, (count, 6), generator=draw).tolist()
    return [
        Item(
            index=100 * update + place,
            role=role,
            shape="text",
            update=update,
            tokens=row[: 4 + place % 3],
            start=1,
            weight=sum(row) / 72,
        )
        for place, row in enumerate(rows)
    ]


def experience(update: int) -> dict[Role, list[Item]]:
    """New rows of this update, replay and memory of all past ones, general text."""
    past = range(1, update)
    return {
        "new": items_of("new", update, 8),
        "replay": [item for number in past for item in items_of("replay", number, 8)[:4]],
        "memory": [item for number in past for item in items_of("memory", number, 8)[:4]],
        "general": items_of("general", 0, 5),
    }


States = dict[str, tuple[dict[str, Tensor], dict[str, object]]]


def states_of(learners: Sequence[Learner]) -> States:
    """What the loop would save."""
    return {learner.name: learner.state() for learner in learners}


def learners_with(configured: Sequence[catalog.Strategy], states: States) -> list[Learner]:
    """Fresh plugins that continue from saved states."""
    learners = build(configured)
    for learner in learners:
        if learner.name in states:
            learner.load_state(*states[learner.name])
    return learners


def one_update(
    configured: Sequence[catalog.Strategy], update: int, theta: Tensor | None, states: States
) -> tuple[BigramLoop, States]:
    """A whole run that continues from the version before."""
    loop, learners = BigramLoop(experience(update), update, theta), learners_with(configured, states)
    for learner in learners:
        learner.before_training_exp(loop)
    loop.train(learners)
    return loop, states_of(learners)


def updates(configured: Sequence[catalog.Strategy], count: int) -> tuple[BigramLoop, States]:
    """So many runs, one after the other."""
    theta: Tensor | None = None
    states: States = {}
    for number in range(1, count + 1):
        loop, states = one_update(configured, number, theta, states)
        theta = loop.adapter.flat
    return loop, states


def assert_equal_states(first: States, second: States) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for name, (tensors, notes) in first.items():
        assert tensors.keys() == second[name][0].keys()
        assert notes == second[name][1]
        for key, tensor in tensors.items():
            assert tensor.dtype == second[name][0][key].dtype
            assert torch.equal(tensor, second[name][0][key])


def save(states: States, directory: Path) -> None:
    """As the loop does: safetensors and JSON."""
    for name, (tensors, notes) in states.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / f"{name}.safetensors")
        (directory / f"{name}.json").write_text(json.dumps(notes))


def load(directory: Path) -> States:
    """The inverse of `save`."""
    return {path.stem: (load_file(path), json.loads(path.with_suffix(".json").read_text()))
            for path in directory.glob("*.safetensors")}  # fmt: skip
