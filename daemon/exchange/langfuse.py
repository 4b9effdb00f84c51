"""Langfuse: traces with their scores, as `GET /api/public/traces/{id}` gives them, one trace a row.

Data types of scores (langfuse.com/docs/evaluation/scores/data-model): BOOLEAN (1 or 0), NUMERIC, CATEGORICAL (`value`
or `stringValue`), CORRECTION (a better output) and TEXT.
"""

from collections.abc import Iterator
from typing import Any

from daemon.exchange.frame import (
    CannotExpress,
    Frame,
    Tool,
    Tree,
    answer_of,
    asked_of,
    conversation,
    number_of,
    only,
    slug,
)

_KINDS = {
    "BOOLEAN": "boolean", "NUMERIC": "float", "CATEGORICAL": "categorical", "CORRECTION": "demonstration",
    "TEXT": "comment",
}  # fmt: skip
_TYPES = {kind: name for name, kind in _KINDS.items()}


def read(trace: Tree, frame: Frame, _state: dict[str, Any]) -> Iterator[Tree]:
    """A record for each score of a trace."""
    for score in trace.get("scores") or []:
        yield _record(trace, score, frame)


def _record(trace: Tree, score: Tree, frame: Frame) -> Tree:
    kind = _KINDS.get(score.get("dataType", "NUMERIC"))
    if kind is None:
        raise ValueError(f"the data type {score['dataType']!r} is not known")
    at = score.get("timestamp") or trace.get("timestamp")
    record = frame.record(kind, at, trace.get("userId"), trace["id"], score["id"])
    if trace.get("sessionId"):
        record["subject"]["session"] = trace["sessionId"]
    record["inference"] = {"id": trace["id"], **({"adapter": trace["version"]} if trace.get("version") else {})}
    if trace.get("input") is not None:
        record["input"] = {"messages": conversation(trace["input"], "user")}
    if trace.get("output") is not None:
        record["output"] = {"messages": conversation(trace["output"], "assistant")}
    said = score.get("stringValue") if isinstance(score.get("stringValue"), str) else score.get("value")
    if kind == "comment":
        return {**record, "comment": str(said)}
    if kind != "demonstration":
        record["metric"] = slug(score["name"])
    record["value"] = _number(score) if kind == "float" else _judged(score) if kind == "boolean" else str(said)
    return record | ({"comment": score["comment"]} if score.get("comment") else {})


def _number(score: Tree) -> int | float:
    return number_of(score["value"])


def _judged(score: Tree) -> bool:
    value = score.get("value")
    if value in (0, 1):
        return bool(value)
    raise ValueError(f"a BOOLEAN score is 1 or 0, not {value!r}")


def write(record: Tree) -> list[Tree]:
    """One trace with one score."""
    kind = record["kind"]
    if kind not in _TYPES:
        raise CannotExpress(f"Langfuse has no score for a {kind}")
    inference = record.get("inference", {})
    trace = {
        "id": inference.get("id", record["id"]), "timestamp": record["ts"], "name": record["model"],
        "userId": record["subject"]["id"], "sessionId": record["subject"].get("session"),
        "version": inference.get("adapter"), "metadata": {},
    }  # fmt: skip
    if record.get("input"):
        trace["input"] = asked_of(record)
    if record.get("output"):
        trace["output"] = {"role": "assistant", "content": answer_of(record)}
    name = record.get("metric") or {"demonstration": "output", "comment": "comment"}[kind]
    score = {"id": record["id"], "traceId": trace["id"], "name": name, "dataType": _TYPES[kind], "source": "API",
             "timestamp": record["ts"], **_value(record)}  # fmt: skip
    return [{**trace, "scores": [score]}]


def _value(record: Tree) -> Tree:
    comment = {"comment": record["comment"]} if record.get("comment") else {}
    match record["kind"]:
        case "boolean":
            return {"value": int(record["value"]), "stringValue": str(record["value"]), **comment}
        case "float":
            return {"value": record["value"], **comment}
        case "categorical":
            return {"value": record["value"], "stringValue": record["value"], **comment}
        case "demonstration":
            return {"value": only(record["value"], "value"), **comment}
        case _:
            return {"value": record.get("comment") or record.get("value")}


def _carry(row: Tree, own: Tree) -> None:
    row["metadata"]["eternad"] = own


def _carried(row: Tree) -> Tree:
    metadata = row.get("metadata")
    return metadata.get("eternad", {}) if isinstance(metadata, dict) else {}


TOOL = Tool(read, write, _carry, _carried)
