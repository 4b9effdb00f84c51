"""TRL's rows (SFT, DPO, KTO) and OpenAI's (fine-tuning, preferences): they hold what is learned, and nothing else.

So a record becomes the rows of its examples, and a row a record whose examples are that row.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec

from daemon import export
from daemon.exchange.frame import CannotExpress, Frame, Tool, Tree
from daemon.ingest import feedback
from daemon.ingest.problem import Problem
from daemon.ingest.rows import example_of


def read(row: Tree, frame: Frame, _state: dict[str, Any]) -> Iterator[Tree]:
    """One record; the same row has the same id."""
    try:
        example = example_of(row)
    except Problem as problem:
        raise ValueError(problem.message) from None
    if isinstance(example.prompt, str):
        raise ValueError("a raw text is content and no feedback: drop it below content/")
    encoded = msgspec.json.encode(row, order="deterministic").decode()
    record = frame.record(example.shape, None, row.get("user"), encoded)
    record["input"] = {"messages": msgspec.to_builtins(example.prompt)}
    if example.shape == "comparison":
        shown = [("a", example.completion), ("b", example.rejected or "")]
        record["outputs"] = [{"id": name, "messages": _said(text)} for name, text in shown]
        return iter([{**record, "value": {"chosen": "a", "rejected": "b"}}])
    if example.shape == "boolean":
        judged = {"output": {"messages": _said(example.completion)}, "metric": "label", "value": example.label}
        return iter([record | judged])
    return iter([{**record, "value": example.completion}])


def _said(text: str) -> list[Tree]:
    return [{"role": "assistant", "content": text}]


def write(record: Tree, shape: export.Shape) -> list[Tree]:
    """The rows of what can be learned from a record; raises `CannotExpress` when there is nothing."""
    try:
        examples = feedback.examples_of(feedback.read(record, record["model"]))
        rows = [export.row(example, shape) for example in examples]
    except export.CannotExport as error:
        raise CannotExpress(str(error)) from None
    if not rows:
        raise CannotExpress(f"of a {record['kind']} alone nothing is learned")
    return rows


TRL = Tool(read, partial(write, shape="trl"))
OPENAI = Tool(read, partial(write, shape="openai"))
