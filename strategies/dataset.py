"""Rows of an experience -> token ids -> micro-batches. Shapes are documented at the fields."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from buffers.example import Shape
from buffers.experience import Role


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

    @property
    def label_tokens(self) -> int:
        """How many tokens the loss is on."""
        return len(self.tokens) - self.start


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Items of similar length, padded at the end: one forward pass."""

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
    """(label rows,) int64: which of `items` a row belongs to"""
    batch_label_tokens: int
    """Label tokens of the whole optimiser batch: the denominator of its mean loss"""
