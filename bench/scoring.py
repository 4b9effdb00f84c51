"""How much of a task a model knows, and how far it has drifted: by one forward pass per row, nothing is generated."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from buffers.example import Example
from buffers.experience import Row
from strategies.adapter import Adapter
from strategies.dataset import Item, MicroBatch, micro_batches, tokenise
from strategies.forward import divergence, label_states, token_losses

TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class TaskRow:
    """One line of a bench file."""

    prompt: str
    completion: str
    options: tuple[str, ...] = ()
    """For classification: the possible completions, without the space in front."""

    @property
    def example(self) -> Example:
        """What is trained on: the prompt as it stands, loss on the completion; without a prompt a text."""
        if not self.prompt:
            return Example(shape="text", completion=self.completion)
        return Example(shape="demonstration", prompt=self.prompt, completion=self.completion)


@dataclass(frozen=True)
class Task:
    """One task of a sequence."""

    name: str
    train: list[TaskRow]
    test: list[TaskRow]
    showings: tuple[int, ...] = ()
    """Of joint training: how often each training row is shown, all in one epoch."""

    @property
    def has_options(self) -> bool:
        """Classification, not facts."""
        return bool(self.test[0].options)


@dataclass(frozen=True)
class Drift:
    """Against the base, on general text that is neither trained on nor rehearsed; nats per token."""

    kl: float
    """KL(base || model)"""
    nll: float
    """The model's loss."""


def read_task(directory: Path, name: str) -> Task:
    """`NAME.train.jsonl` and `NAME.test.jsonl`, lines of `{task, prompt, completion[, options]}`."""
    return Task(name, _read(directory / f"{name}.train.jsonl"), _read(directory / f"{name}.test.jsonl"))


def _read(path: Path) -> list[TaskRow]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [TaskRow(row["prompt"], row["completion"], tuple(row.get("options", ()))) for row in rows]


def task_score(adapter: Adapter, task: Task) -> float:
    """Share of the test rows that are right under the adapter's present weights."""
    right = chosen(adapter, task.test) if task.has_options else recalled(adapter, task.test)
    return sum(right) / len(right)


@torch.no_grad()
def recalled(adapter: Adapter, rows: Sequence[TaskRow]) -> list[bool]:
    """For each row whether every token of the answer is the most likely one, given the prompt and those before it."""
    items = [_without_end(_item(row, place, adapter)) for place, row in enumerate(rows)]
    right = [False] * len(rows)
    for micro in micro_batches(items, TOKENS_PER_PASS):
        hits = _logits(adapter, micro).argmax(-1).cpu() == micro.targets
        for place, item in enumerate(micro.items):
            right[item.index] = bool(hits[micro.owner == place].all())
    return right


@torch.no_grad()
def chosen(adapter: Adapter, rows: Sequence[TaskRow]) -> list[bool]:
    """For each row whether its completion's first token is the most likely among the options' first tokens."""
    items = [_without_end(_item(row, place, adapter)) for place, row in enumerate(rows)]
    firsts = [_first_tokens(row, adapter) for row in rows]
    right = [False] * len(rows)
    for micro in micro_batches(items, TOKENS_PER_PASS):
        logits = _logits(adapter, micro).cpu()
        for place, item in enumerate(micro.items):
            options = firsts[item.index]
            best = int(logits[micro.owner == place][0, options].argmax())
            right[item.index] = options[best] == item.tokens[item.start]
    return right


def _first_tokens(row: TaskRow, adapter: Adapter) -> list[int]:
    found = [int(adapter.tokenizer(f" {option}", add_special_tokens=False)["input_ids"][0]) for option in row.options]
    if len(set(found)) != len(found):
        raise ValueError(f"options {row.options} share a first token: one forward pass cannot tell them apart")
    return found


def _item(row: TaskRow, place: int, adapter: Adapter) -> Item:
    return tokenise(Row(role="eval", update=0, id=0, example=row.example), place, adapter.tokenizer, 1024)


def _without_end(item: Item) -> Item:
    """Whether the model would also stop there is another question."""
    return Item(item.index, item.role, item.shape, item.update, item.tokens[:-1], item.start)


def _logits(adapter: Adapter, micro: MicroBatch) -> torch.Tensor:
    return adapter.head.logits(label_states(adapter, micro))


def drift(adapter: Adapter, texts: Sequence[str]) -> Drift:
    """How far the present weights are from the base on `texts`."""
    rows = [Row(role="eval", update=0, id=0, example=Example(shape="text", completion=text)) for text in texts]
    # without the end token: a text that stops is no knowledge of the world, and every update moves it
    items = [_without_end(tokenise(row, place, adapter.tokenizer, 1024)) for place, row in enumerate(rows)]
    return Drift(
        kl=float(divergence(adapter, items, adapter.disabled()).mean()),
        nll=float(token_losses(adapter, items).mean()),
    )
