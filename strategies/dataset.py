"""Rows of an experience -> token ids -> micro-batches. Shapes are documented at the fields."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from buffers.example import Example, Shape, content_hash, reservoir_weight
from buffers.experience import Role, Row
from strategies.failure import Failure

IGNORED = -100
"""Label of a token without loss, as everywhere in torch and transformers."""


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One tokenised row. `eq=False`: hashed by identity, so that it can key a cache."""

    index: int
    """Its place in the experience file."""
    role: Role
    shape: Shape
    update: int
    """The update in which it was new."""
    tokens: Sequence[int]
    """Prompt, completion and end-of-turn token."""
    start: int
    """The loss is on `tokens[start:]`; at least 1, as nothing predicts the first token."""
    rejected: Sequence[int] | None = None
    """For `comparison`: the prompt followed by the rejected completion; it shares `start`."""
    label: bool | None = None
    """For `boolean`: whether the completion was good."""
    weight: float = 0.0
    """Its weight in the replay buffer (`buffers.example.reservoir_weight`)."""
    was_cut: bool = False
    """Whether it was longer than `sequence_tokens`."""
    is_anchor: bool = False
    """Held to a teacher and not learned: its tokens have no loss of their own (see `strategies.distill`)."""

    @property
    def is_preference(self) -> bool:
        """Whether its loss compares whole completions."""
        return self.shape in ("comparison", "boolean")

    @property
    def label_tokens(self) -> int:
        """How many tokens the loss is on."""
        return max(len(self.tokens) - self.start, 0)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Sequences of similar length, padded at the end: one forward pass.

    Sequences: every item's own, then the rejected ones of its comparisons. Items with a token loss and items with a
    preference loss are never mixed.
    """

    items: tuple[Item, ...]
    tokens: Tensor
    """(sequences, length) int64"""
    mask: Tensor
    """(sequences, length) bool: real tokens"""
    rows: Tensor
    """(label rows,) int64: sequence * length + position of the hidden state that predicts a label; item by item, in
    the order of `items` and of each item's label tokens"""
    targets: Tensor
    """(label rows,) int64: the token to predict"""
    owner: Tensor
    """(label rows,) int64: which of the sequences a row belongs to"""
    batch_label_tokens: int
    """Label tokens of the optimiser batch's items with a token loss: the denominator of its mean loss"""
    batch_anchor_tokens: int
    """Label tokens of its anchors: the denominator of their mean divergence. A text of a hundred tokens beside answers
    of five would otherwise leave the answers next to nothing of the step"""
    batch_items: int
    """Items of the optimiser batch"""

    @property
    def is_preference(self) -> bool:
        """Whether the items have a preference loss instead of a token loss."""
        return any(item.is_preference for item in self.items)


def tokenise(row: Row, index: int, tokenizer: Any, sequence_tokens: int) -> Item:
    """The item of `row`. Loss on the completion and its end-of-turn token, for shape `text` on every token."""
    example = row.example
    prompt = prompt_tokens(example, tokenizer)
    tokens = [*prompt, *_completion_tokens(example, example.completion, tokenizer)]
    rejected = None
    if example.rejected is not None:
        rejected = [*prompt, *_completion_tokens(example, example.rejected, tokenizer)][:sequence_tokens]
    return Item(
        index=index,
        role=row.role,
        shape=example.shape,
        update=row.update,
        tokens=tokens[:sequence_tokens],
        start=max(len(prompt), 1),
        rejected=rejected,
        label=example.label,
        weight=reservoir_weight(content_hash(example)),
        was_cut=len(tokens) > sequence_tokens,
    )


def prompt_tokens(example: Example, tokenizer: Any) -> list[int]:
    """What the model is fed before it answers: chat messages in its own template, a string as it stands."""
    if isinstance(example.prompt, str):
        # an empty prompt still gets the token that the tokenizer starts every text with, if it has one
        return list(tokenizer(example.prompt)["input_ids"])
    return list(tokenizer(_render(example, tokenizer), add_special_tokens=False)["input_ids"])


def _render(example: Example, tokenizer: Any, answer: str | None = None) -> str:
    messages = [{"role": message.role, "content": message.content} for message in example.prompt]  # type: ignore[union-attr]
    if tokenizer.chat_template is None:
        raise Failure("no_chat_template", "the base model has no chat template; write prompts as plain strings")
    if answer is None:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return str(tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False))


def _completion_tokens(example: Example, completion: str, tokenizer: Any) -> list[int]:
    """The completion and the token that ends it: without that label a model never learns to stop."""
    if tokenizer.eos_token_id is None:
        raise Failure("no_end_token", "the tokenizer of the base model has no end-of-sequence token")
    if isinstance(example.prompt, str):
        return [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    prefix, whole = _render(example, tokenizer), _render(example, tokenizer, completion)
    # templates that rewrite earlier turns have no common prefix: then the plain completion and its end
    answer = whole[len(prefix) :] if whole.startswith(prefix) else completion
    tokens = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    specials = set(tokenizer.all_special_ids)
    ends = [place for place, token in enumerate(tokens) if token in specials]
    # what a template writes after the end-of-turn token (a newline) is never generated
    return tokens[: ends[-1] + 1] if ends else [*tokens, tokenizer.eos_token_id]


def batches(items: Sequence[Item], batch_examples: int, seed: int, epoch: int) -> list[list[Item]]:
    """The optimiser batches of one epoch: every item once, in an order that only `seed` and `epoch` decide.

    Anchors are spread evenly: two steps without one would be two steps that nothing holds.
    """
    draw = random.Random(f"{seed}/{epoch}")
    order = [item for item in items if not item.is_anchor]
    anchors = [item for item in items if item.is_anchor]
    draw.shuffle(order)
    draw.shuffle(anchors)
    for place, anchor in enumerate(anchors):
        order.insert((2 * place + 1) * len(items) // (2 * len(anchors)), anchor)
    return [order[place : place + batch_examples] for place in range(0, len(order), batch_examples)]


def micro_batches(
    items: Sequence[Item], micro_batch_tokens: int, pad: int = 0, part: tuple[int, int] = (0, 1)
) -> list[MicroBatch]:
    """Cut a batch into forward passes of items of similar length, of at most `micro_batch_tokens` with padding.

    A longer item stands alone. What is computed does not depend on the cut. `part`: (n, of) for every of-th item from
    the n-th; its denominators are those of the whole batch, so that the parts' gradients add up to the batch's.
    """
    # a batch of nothing but cut prompts has no label and no loss; its denominator must not be 0
    label_tokens = max(sum(item.label_tokens for item in items if not item.is_preference and not item.is_anchor), 1)
    anchor_tokens = max(sum(item.label_tokens for item in items if item.is_anchor), 1)
    ordered = sorted(items, key=lambda item: (item.is_preference, -_length(item), item.index))
    groups: list[list[Item]] = []
    for item in ordered[part[0] :: part[1]]:
        if groups and _fits(item, groups[-1], micro_batch_tokens):
            groups[-1].append(item)
        else:
            groups.append([item])
    return [_stack(tuple(group), label_tokens, anchor_tokens, len(items), pad) for group in groups]


def empty_micro_batch() -> MicroBatch:
    """One token, no item and no label row: every sum over it is empty, and so is its gradient."""
    none, token = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    return MicroBatch((), token, torch.ones_like(token, dtype=torch.bool), none, none, none, 1, 1, 1)


def _fits(item: Item, group: list[Item], micro_batch_tokens: int) -> bool:
    """Whether `group`, whose first item is its longest, can take `item` too."""
    sequences = sum(1 + (other.rejected is not None) for other in (item, *group))
    return item.is_preference == group[0].is_preference and sequences * _length(group[0]) <= micro_batch_tokens


def _length(item: Item) -> int:
    return max(len(item.tokens), len(item.rejected or ()))


def _stack(items: tuple[Item, ...], label_tokens: int, anchor_tokens: int, batch_items: int, pad: int) -> MicroBatch:
    rejecting = [item for item in items if item.rejected is not None]
    sequences = [item.tokens for item in items] + [item.rejected or () for item in rejecting]
    starts = [item.start for item in (*items, *rejecting)]
    return MicroBatch(items, *_pad_and_index(sequences, starts, pad), label_tokens, anchor_tokens, batch_items)


def _pad_and_index(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], pad: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    length = max(len(tokens) for tokens in sequences)
    tokens = torch.full((len(sequences), length), pad)
    mask = torch.zeros((len(sequences), length), dtype=torch.bool)
    rows: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for place, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        tokens[place, : len(sequence)] = torch.tensor(sequence)
        mask[place, : len(sequence)] = True
        # the hidden state at position p predicts the token at p + 1
        rows += range(place * length + start - 1, place * length + len(sequence) - 1)
        targets += sequence[start:]
        owner += [place] * max(len(sequence) - start, 0)
    return tokens, mask, torch.tensor(rows).long(), torch.tensor(targets).long(), torch.tensor(owner).long()


class TokenDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """Items in the form that Avalanche's datasets expect: (x, y, task label).

    x: (tokens,) int64; y: (tokens,) int64, x with -100 where there is no loss; the task label is the item's place, by
    which the loop finds the item again after a plugin has cut or mixed the dataset.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)
        self.targets = [item.update for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, int]:
        item = self.items[place]
        x = torch.tensor(item.tokens)
        y = x.clone()
        y[: item.start] = IGNORED
        return x, y, place
