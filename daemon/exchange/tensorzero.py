"""TensorZero: rows of its tables as `FORMAT JSONEachRow` gives them, inferences before their feedback.

Tables (tensorzero.com/docs/gateway/data-model): ChatInference; BooleanMetricFeedback and FloatMetricFeedback
(`target_id`, `metric_name`, `value`), CommentFeedback (`target_id`, `target_type`, `value`), DemonstrationFeedback
(`inference_id`, `value`). Ids are UUIDv7 there as here.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from daemon.exchange.frame import CannotExpress, Frame, Tool, Tree, answer_of, asked_of, number_of, only, slug, text_of


def read(row: Tree, frame: Frame, state: dict[str, Any]) -> Iterator[Tree]:
    """Nothing for an inference, which is remembered; a record for feedback about one."""
    if "function_name" in row:
        state[row["id"]] = row
        return
    target = row.get("target_id") or row["inference_id"]
    inference = state.get(target)
    if inference is None:
        raise ValueError(f"its inference {target} does not stand before it")
    yield _record(row, inference, frame)


def _record(row: Tree, inference: Tree, frame: Frame) -> Tree:
    value = row["value"]
    kind = _kind(row, value)
    tags = {**(inference.get("tags") or {}), **(row.get("tags") or {})}
    record = frame.record(kind, _time_of(row["id"]), tags.get("user_id"), row["id"])
    record["id"] = row["id"]
    told = {"id": inference["id"], "episode_id": inference.get("episode_id"), "adapter": inference.get("variant_name")}
    record["inference"] = {key: each for key, each in told.items() if each}
    record["input"] = {"messages": _asked(_json(inference["input"]))}
    record["output"] = {"messages": [{"role": "assistant", "content": text_of(_json(inference["output"]))}]}
    if kind == "comment":
        return {**record, "comment": value}
    if kind == "demonstration":
        return {**record, "value": text_of(_json(value))}
    return {**record, "metric": slug(row["metric_name"]), "value": value if kind == "boolean" else number_of(value)}


def _kind(row: Tree, value: object) -> str:
    if "inference_id" in row or row.get("metric_name") == "demonstration":
        return "demonstration"
    if "target_type" in row or row.get("metric_name") == "comment":
        return "comment"
    return "boolean" if isinstance(value, bool) else "float"


def _time_of(identity: str) -> str:
    """A UUIDv7 begins with its time in milliseconds."""
    return datetime.fromtimestamp(int(identity.replace("-", "")[:12], 16) / 1000, UTC).isoformat()


def _json(value: object) -> Any:
    """Columns hold JSON as text; what is none is a text itself."""
    if not isinstance(value, str):
        return value
    try:
        parsed = msgspec.json.decode(value)
    except msgspec.DecodeError:
        return value
    return parsed if isinstance(parsed, list | dict) else value


def _asked(given: Tree) -> list[Tree]:
    system = given.get("system")
    first = [{"role": "system", "content": text_of(system)}] if system else []
    return first + [{"role": each["role"], "content": text_of(each["content"])} for each in given["messages"]]


def write(record: Tree) -> list[Tree]:
    """The inference and the feedback about it."""
    kind, inference = record["kind"], record.get("inference", {})
    if kind not in ("boolean", "float", "comment", "demonstration"):
        raise CannotExpress(f"TensorZero has no feedback for a {kind}")
    if "-" not in record["id"]:
        raise CannotExpress("TensorZero's ids are UUIDs, and this record's is a ULID")
    about = {
        "id": inference.get("id", record["id"]), "function_name": record["model"],
        "variant_name": inference.get("adapter", ""), "episode_id": inference.get("episode_id"),
        "input": msgspec.json.encode(_input(asked_of(record))).decode(),
        "output": _blocks(answer_of(record)), "tags": {"user_id": record["subject"]["id"]},
    }  # fmt: skip
    row: Tree = {"id": record["id"], "tags": {}}
    if kind == "demonstration":
        row |= {"inference_id": about["id"], "value": _blocks(only(record["value"], "value"))}
    elif kind == "comment":
        said = record.get("comment") or record.get("value")
        row |= {"target_id": about["id"], "target_type": "inference", "value": said}
    else:
        row |= {"target_id": about["id"], "metric_name": record["metric"], "value": record["value"]}
    return [about, row]


def _input(messages: list[Tree]) -> Tree:
    first = messages[0] if messages[0]["role"] == "system" else None
    rest = messages[1:] if first else messages
    if any(each["role"] not in ("user", "assistant") for each in rest) or (first and not first["content"]):
        raise CannotExpress("TensorZero's input is one system text, then messages of user and assistant")
    said = [{"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in rest]
    return {"messages": said, **({"system": first["content"]} if first else {})}


def _blocks(text: str) -> str:
    return msgspec.json.encode([{"type": "text", "text": text}]).decode()


def _carry(row: Tree, own: Tree) -> None:
    row["tags"]["eternad"] = msgspec.json.encode(own).decode()


def _carried(row: Tree) -> Tree:
    tags = row.get("tags")
    own = _json(tags["eternad"]) if isinstance(tags, dict) and "eternad" in tags else {}
    return own if isinstance(own, dict) else {}


TOOL = Tool(read, write, _carry, _carried)
