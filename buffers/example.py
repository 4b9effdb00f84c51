"""The one trainable item: what it is, its canonical form and its content hash.

A content file or a feedback record becomes one or several examples. Two examples with the same canonical form are the
same example, wherever they came from.
"""

import hashlib
import random
from typing import Literal

import msgspec

Shape = Literal["text", "demonstration", "comparison", "boolean"]
Split = Literal["train", "heldout", "eval"]


class Message(msgspec.Struct, frozen=True):
    """One chat message as OpenAI writes it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Example(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model is trained on.

    - `text`: `completion` is the text, `prompt` is empty; the loss is on every token.
    - `demonstration`: the loss is on `completion` alone.
    - `comparison`: `completion` is preferred to `rejected` (DPO).
    - `boolean`: `label` says whether `completion` was good (KTO).

    A prompt is a plain string, used as it stands, or chat messages, rendered with the model's own template.
    """

    shape: Shape
    completion: str
    prompt: str | tuple[Message, ...] = ""
    rejected: str | None = None
    label: bool | None = None

    def __post_init__(self) -> None:
        if not self.completion:
            raise ValueError("an example needs a completion (for shape `text`: the text)")
        if (self.shape == "comparison") != (self.rejected is not None):
            raise ValueError("`rejected` belongs to shape `comparison` and to no other")
        if (self.shape == "boolean") != (self.label is not None):
            raise ValueError("`label` belongs to shape `boolean` and to no other")


class Origin(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where an example came from: never trained on, only counted, capped, shown and erased by."""

    file: str
    line: int = 0
    collection: str = ""
    source: str = ""
    subject: str | None = None
    record_id: str | None = None


_encoder = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder(Example, strict=True)


def canonical(example: Example) -> bytes:
    """JSON with sorted keys, without defaults and white space: equal examples have equal bytes."""
    return _encoder.encode(example)


def parse(body: bytes | str) -> Example:
    """The inverse of `canonical`; raises `msgspec.ValidationError` on anything else."""
    return _decoder.decode(body)


def content_hash(example: Example) -> str:
    """SHA-256 (hex) of the canonical form."""
    return hashlib.sha256(canonical(example)).hexdigest()


def reservoir_weight(digest: str) -> float:
    """Uniform in (0, 1), seeded by a content hash: who has the largest weights stays in the replay buffer.

    A re-ingested journal thus has the same buffer, and whoever keeps something per example can keep the same ones.
    """
    return random.Random(digest).random()


def prompt_hash(example: Example) -> str:
    """SHA-256 (hex) of what is asked (of the text itself for shape `text`): two examples that ask the same share it.

    Examples that share it are kept on the same side of the hold-out, so that an answer never leaks.
    """
    asked = example.completion if example.shape == "text" else example.prompt
    return hashlib.sha256(_encoder.encode(asked)).hexdigest()
