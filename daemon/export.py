"""Examples as rows that other tools train on: TRL's SFT, DPO and KTO shapes, and OpenAI's fine-tuning shapes.

`daemon.ingest.rows.example_of` reads all of them back: for every example that a shape can express, the round trip
gives the same example.
"""

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from buffers.example import Example, Message
from daemon.state import examples
from daemon.state.database import Connection

Shape = Literal["trl", "openai"]


class CannotExport(ValueError):
    """The shape has no words for this example."""


def row(example: Example, shape: Shape) -> dict[str, Any]:
    """One example as a row; raises `CannotExport`, for instance for a raw prompt in OpenAI's shapes."""
    return _trl(example) if shape == "trl" else _openai(example)


def rows(connection: Connection, model: str, shape: Shape) -> Iterator[dict[str, Any]]:
    """Every example of a model that counts, in the order of its journal; what a shape cannot express is left out."""
    for example in examples.of_model(connection, model):
        try:
            yield row(example, shape)
        except CannotExport:
            continue


def _trl(example: Example) -> dict[str, Any]:
    if example.shape == "text":
        return {"text": example.completion}
    is_raw = isinstance(example.prompt, str)
    prompt = {"prompt": example.prompt, "raw": True} if is_raw else {"prompt": _messages(example.prompt)}

    def answer(text: str) -> Any:
        return text if is_raw else [{"role": "assistant", "content": text}]

    if example.shape == "comparison":
        return {**prompt, "chosen": answer(example.completion), "rejected": answer(example.rejected or "")}
    label = {} if example.label is None else {"label": example.label}
    return {**prompt, "completion": answer(example.completion), **label}


def _openai(example: Example) -> dict[str, Any]:
    if isinstance(example.prompt, str) or example.shape not in ("demonstration", "comparison"):
        raise CannotExport(f"OpenAI's shapes have no {example.shape} with this kind of prompt")
    prompt = _messages(example.prompt)
    if example.shape == "demonstration":
        return {"messages": [*prompt, {"role": "assistant", "content": example.completion}]}
    return {
        "input": {"messages": prompt},
        "preferred_output": [{"role": "assistant", "content": example.completion}],
        "non_preferred_output": [{"role": "assistant", "content": example.rejected}],
    }


def _messages(prompt: str | tuple[Message, ...]) -> list[dict[str, str]]:
    return list(msgspec.to_builtins(prompt))
