"""Label Studio: tasks with their annotations, as its JSON export writes them (labelstud.io/guide/task_format).

Results of the types `pairwise` (two answers), `rating` and `number`, `choices` (yes and no: a judgement) and `textarea`
(a better answer, or a comment if the control is called so). `data` holds the prompt and the answers.
"""

from collections.abc import Iterator
from typing import Any

from daemon.exchange.argilla import COMMENTS
from daemon.exchange.frame import (
    CannotExpress,
    Frame,
    Tool,
    Tree,
    answer_of,
    asked_of,
    fields_of,
    judgement_of,
    number_of,
    only,
    shown,
    slug,
)  # fmt: skip


def read(task: Tree, frame: Frame, _state: dict[str, Any]) -> Iterator[Tree]:
    """A record for each result of each annotation that was not cancelled."""
    asked, answers = fields_of(task["data"])
    for annotation in task.get("annotations") or []:
        if annotation.get("was_cancelled"):
            continue
        for result in annotation["result"]:
            person = annotation.get("completed_by")
            person = person.get("email") if isinstance(person, dict) else person
            at = annotation.get("created_at")
            base = frame.record("comment", at, person, task["id"], annotation["id"], result["id"])
            base["inference"] = {"id": str(task["id"])}
            base["input"] = {"messages": asked}
            yield base | _judged(result, answers)


def _judged(result: Tree, answers: dict[str, list[Tree]]) -> Tree:
    kind, value, name = result["type"], result["value"], result["from_name"]
    if kind == "pairwise":
        return _compared(value["selected"], answers)
    output = {"output": shown(answers)} if answers else {}
    if kind in ("rating", "number"):
        return {"kind": "float", "metric": slug(name), "value": number_of(value[kind]), **output}
    if kind == "textarea":
        text = "\n".join(value["text"]) if isinstance(value["text"], list) else value["text"]
        return (
            {"kind": "comment", "comment": text} if name in COMMENTS else {"kind": "demonstration", "value": text}
        ) | output
    if kind == "choices":
        said = value["choices"][0]
        judgement = judgement_of(said)
        is_category = judgement is None
        return {
            "kind": "categorical" if is_category else "boolean", "metric": slug(name),
            "value": said if is_category else judgement, **output,
        }  # fmt: skip
    raise ValueError(f"results of the type {kind!r} are about no text")


def _compared(selected: str, answers: dict[str, list[Tree]]) -> Tree:
    if len(answers) != 2 or selected not in ("left", "right"):
        raise ValueError(f"two answers are compared, and there are {sorted(answers)}")
    left, right = answers
    chosen, rejected = (left, right) if selected == "left" else (right, left)
    outputs = [{"id": name, "messages": said} for name, said in answers.items()]
    return {"kind": "comparison", "outputs": outputs, "value": {"chosen": chosen, "rejected": rejected}}


def write(record: Tree) -> list[Tree]:
    """One task with one annotation."""
    name, kind, value, answers = _result(record)
    if "prompt" in answers:
        raise CannotExpress("an answer may not be called `prompt`")
    result = {
        "id": record["id"], "from_name": name, "to_name": ",".join(answers) or "prompt", "type": kind, "value": value,
        "origin": "manual",
    }  # fmt: skip
    annotation = {
        "id": record["id"], "completed_by": record["subject"]["id"], "created_at": record["ts"],
        "was_cancelled": False, "result": [result],
    }  # fmt: skip
    task = record.get("inference", {}).get("id", record["id"])
    return [{"id": task, "data": {"prompt": asked_of(record), **answers}, "annotations": [annotation], "meta": {}}]


def _result(record: Tree) -> tuple[str, str, Tree, dict[str, str]]:
    """(control, type, value, answers)."""
    kind = record["kind"]
    if kind == "comparison":
        return _pair(record)
    answers = {"response": answer_of(record)} if record.get("output") else {}
    if kind == "boolean":
        return record["metric"], "choices", {"choices": ["yes" if record["value"] else "no"]}, answers
    if kind == "float":
        return record["metric"], "number", {"number": record["value"]}, answers
    if kind == "categorical":
        if judgement_of(record["value"]) is not None:
            raise CannotExpress("a category yes or no would come back as a judgement")
        return record["metric"], "choices", {"choices": [record["value"]]}, answers
    if kind == "demonstration":
        return "correction", "textarea", {"text": [only(record["value"], "value")]}, answers
    if kind == "comment":
        return "comment", "textarea", {"text": [record.get("comment") or record.get("value")]}, answers
    raise CannotExpress(f"Label Studio has no control for a {kind}")


def _pair(record: Tree) -> tuple[str, str, Tree, dict[str, str]]:
    answers = {str(each["id"]): only(each["messages"], "outputs") for each in record["outputs"]}
    if len(answers) != 2:
        raise CannotExpress("Label Studio's Pairwise compares two answers")
    selected = "left" if record["value"]["chosen"] == next(iter(answers)) else "right"
    return "preference", "pairwise", {"selected": selected}, answers


def _carry(row: Tree, own: Tree) -> None:
    row["meta"]["eternad"] = own


def _carried(row: Tree) -> Tree:
    own = (row.get("meta") or {}).get("eternad", {})
    return own if isinstance(own, dict) else {}


TOOL = Tool(read, write, _carry, _carried)
