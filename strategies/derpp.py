"""Dark experience replay: a buffered example is kept with what the model said when it learned it.

Buzzega et al., arXiv:2004.07211 (DER++):  L_new + alpha D(stored, model) + beta L_replay   on replayed examples

beta L_replay is the replay in the training mix. D is KL(stored || model) over the stored K most likely tokens and the
rest (`distill.divergence`) instead of the paper's squared distance of logits: a vocabulary of 50,000 logits per token
cannot be stored, and the squared distance is the limit of this KL at high temperature (Hinton et al., 1503.02531, 2.1).
The paper stores the logits while it trains; here they are those of the weights that were kept, which is what players
saw. Stored answers live in the strategy's state, keyed by the hash of the row's tokens, so a version that is rolled
back takes its answers back too. `cap` examples are kept: those with the largest weights in the replay buffer, hence the
ones that it keeps as well. Memory: cap x tokens x K x 6 bytes, whatever the number of updates.
"""

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.dataset import Item, MicroBatch
from strategies.distill import HeldRows, is_sequence
from strategies.learner import JsonNotes, Learner, Loop, RowTerm


@dataclass(frozen=True, slots=True)
class Answers:
    """What was said at every label row of one example."""

    weight: float
    """The example's weight in the replay buffer."""
    tokens: Tensor
    """(label rows, K) int32"""
    logprobs: Tensor
    """(label rows, K) float16"""


def key_of(item: Item) -> int:
    """63 bits of the SHA-256 of the row's tokens and where its labels start: the same in every update."""
    digest = hashlib.sha256(array("q", [item.start, *item.tokens]).tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def pack(answers: Mapping[int, Answers]) -> dict[str, Tensor]:
    """keys, weights and rows (n,): label rows of each; tokens and logprobs (all rows, K). Nothing for no answers."""
    if not answers:
        return {}
    keys = sorted(answers)
    return {
        "keys": torch.tensor(keys),
        "weights": torch.tensor([answers[key].weight for key in keys], dtype=torch.float64),
        "rows": torch.tensor([len(answers[key].tokens) for key in keys]),
        "tokens": torch.cat([answers[key].tokens for key in keys]),
        "logprobs": torch.cat([answers[key].logprobs for key in keys]),
    }


def unpack(tensors: Mapping[str, Tensor]) -> dict[int, Answers]:
    """The inverse of `pack`."""
    if not tensors:
        return {}
    sizes = tensors["rows"].tolist()
    rows = tensors["tokens"].split(sizes), tensors["logprobs"].split(sizes)
    parts = zip(tensors["weights"].tolist(), *rows, strict=True)
    return {key: Answers(*part) for key, part in zip(tensors["keys"].tolist(), parts, strict=True)}


class DarkReplay(Learner, supports_distributed=True):
    """DER++ on replayed rows. State: the stored answers."""

    name = "derpp"

    def __init__(self, parameters: catalog.DerPlusPlus) -> None:
        super().__init__()
        self.parameters = parameters
        self.answers: dict[int, Answers] = {}

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:  # noqa: ARG002 - no notes
        """The answers of all past updates."""
        self.answers = unpack(tensors)

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """At most `cap` answers."""
        return pack(self.answers), {}

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Say how many of the replayed rows have an answer."""
        held = [item for item in strategy.items["replay"] if key_of(item) in self.answers]
        strategy.report(self.name, "examples", len(held))

    def row_term(self, loop: Loop, micro: MicroBatch) -> RowTerm | None:  # noqa: ARG002 - the contract
        """The term of the replayed items that have a stored answer; None when there are none."""
        teachers = [self._answer(item) for item in micro.items]
        if not any(teachers):
            return None
        weight = self.parameters.strength / micro.batch_label_tokens
        return HeldRows(micro, teachers, [weight] * len(micro.items))

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Store what the kept weights say about the rows that were new, and drop all but `cap`."""
        fresh = {key_of(item): item for item in strategy.items["new"] if is_sequence(item)}
        weights = {key: answer.weight for key, answer in self.answers.items()}
        weights |= {key: item.weight for key, item in fresh.items()}
        largest = sorted(weights, key=lambda key: (weights[key], key), reverse=True)[: self.parameters.cap]
        stored = [key for key in largest if key in fresh]
        tops = strategy.teacher_top([fresh[key] for key in stored], "current", self.parameters.top) if stored else []
        said = {
            key: Answers(weights[key], top.tokens.to("cpu", torch.int32), top.logprobs.to("cpu", torch.float16))
            for key, top in zip(stored, tops, strict=True)
        }
        self.answers = {key: said.get(key) or self.answers[key] for key in largest}
        strategy.report(self.name, "stored", len(self.answers))

    def _answer(self, item: Item) -> Answers | None:
        if item.role != "replay" or not is_sequence(item):
            return None
        answer = self.answers.get(key_of(item))
        return answer if answer is not None and len(answer.tokens) == item.label_tokens else None
