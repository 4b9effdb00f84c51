"""Feedback as other tools write it, to and from records of `eternad.feedback/1` (see `docs/feedback.md`).

Each tool is one module that knows its rows: `read` makes records of rows, `write` makes rows of one record. What the
rows of a tool have no place for travels with them as `eternad`, where the tool keeps metadata, so that nothing is lost
on the way there and back; what people change in the tool counts.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from daemon.exchange import argilla, label_studio, langfuse, tensorzero, training
from daemon.exchange.frame import CannotExpress as CannotExpress
from daemon.exchange.frame import Frame as Frame
from daemon.exchange.frame import Tree, is_same

TOOLS = {
    "trl": training.TRL, "openai": training.OPENAI, "langfuse": langfuse.TOOL, "tensorzero": tensorzero.TOOL,
    "argilla": argilla.TOOL, "label-studio": label_studio.TOOL,
}  # fmt: skip
"""By the name that `eternad feedback import --from` and `export --to` know."""


CONTENT = ("input", "output", "outputs", "metric", "value", "comment")
"""What people change in a tool."""


def records_of(name: str, rows: Iterable[Any], frame: Frame) -> Iterator[Tree | ValueError]:
    """Records of a tool's rows, and for a row that gives none the reason; raises nothing."""
    tool = TOOLS[name]
    state: dict[str, Any] = {}
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, dict):
                raise ValueError("a row is a JSON object")
            own = tool.carried(row)
            for record in tool.read(row, frame, state):
                yield _with(record, own)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            yield ValueError(f"row {number}: {why}")


def _with(record: Tree, own: Tree) -> Tree:
    """A record with what travelled beside it; what was changed in the tool meanwhile stays as it is there."""
    has, was, lacking = own.get("has", {}), own.get("was", {}), own.get("lacks", [])
    kept = {key: value for key, value in has.items() if key not in was or is_same(record.get(key), was[key])}
    return {key: value for key, value in (record | kept).items() if key not in lacking}


def rows_of(name: str, record: Tree) -> list[Tree]:
    """The rows of one record, the one that carries its metadata last; raises `CannotExpress`."""
    tool = TOOLS[name]
    rows = tool.write(record)
    if tool.carry is None:
        return rows
    state: dict[str, Any] = {}
    frame = Frame(tool=name, model=record["model"])
    (bare,) = [each for row in rows for each in tool.read(msgspec.json.decode(msgspec.json.encode(row)), frame, state)]
    has = {key: value for key, value in record.items() if key not in bare or not is_same(bare[key], value)}
    was = {key: bare[key] for key in has if key in CONTENT and key in bare}
    lacks = [key for key in bare if key not in record]
    parts = {"has": has, "was": was, "lacks": lacks}
    tool.carry(rows[-1], {name: part for name, part in parts.items() if part})
    return rows
