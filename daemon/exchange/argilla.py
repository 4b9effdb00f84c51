"""Argilla: records as `dataset.records.to_json` writes them (argilla 2: `rg.Record.to_dict`).

`fields` holds the prompt and the answers, `responses` for each question who answered what: a ranking of fields compares
them, a rating is a number, a label is a category (yes and no: a judgement), a text a better answer or a comment, by the
name of the question.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

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

COMMENTS = ("comment", "comments", "notes", "reason", "feedback")
TEXTS = ("correction", "corrected", "rewrite", "better_answer", "demonstration")


def read(row: Tree, frame: Frame, _state: dict[str, Any]) -> Iterator[Tree]:
    """A record for each response to each question."""
    asked, answers = fields_of(row["fields"])
    for question, responses in (row.get("responses") or {}).items():
        for place, response in enumerate(responses):
            base = frame.record("comment", None, response.get("user_id"), row["id"], question, place)
            base["inference"] = {"id": str(row["id"])}
            base["input"] = {"messages": asked}
            yield base | _judged(question, response["value"], answers)


def _judged(question: str, value: Any, answers: dict[str, list[Tree]]) -> Tree:
    if isinstance(value, list):
        return _ranked(value, answers)
    if isinstance(value, int | float):
        return {"kind": "float", "metric": slug(question), "value": number_of(value), "output": shown(answers)}
    if question in COMMENTS:
        return {"kind": "comment", "comment": str(value), **({"output": shown(answers)} if answers else {})}
    if question in TEXTS:
        return {"kind": "demonstration", "value": str(value), **({"output": shown(answers)} if answers else {})}
    judgement = judgement_of(value)
    kind = "categorical" if judgement is None else "boolean"
    said = str(value) if judgement is None else judgement
    return {"kind": kind, "metric": slug(question), "value": said, "output": shown(answers)}


def _ranked(value: list[Any], answers: dict[str, list[Tree]]) -> Tree:
    """A ranking: names of fields, the best first, or `{"value", "rank"}` in any order."""
    ranked = sorted(value, key=lambda each: each.get("rank", 0)) if isinstance(value[0], dict) else value
    names = [each["value"] if isinstance(each, dict) else each for each in ranked]
    if len(names) < 2 or set(names) - set(answers):
        raise ValueError(f"a ranking names two or more of the fields {sorted(answers)}, not {names}")
    outputs = [{"id": name, "messages": said} for name, said in answers.items() if name in names]
    return {"kind": "comparison", "outputs": outputs, "value": {"chosen": names[0], "rejected": names[-1]}}


def write(record: Tree) -> list[Tree]:
    """One record with one response."""
    question, value, answers = _question(record)
    if "prompt" in answers:
        raise CannotExpress("an answer may not be called `prompt`")
    response = {"value": value, "user_id": record["subject"]["id"]}
    return [
        {
            "id": record.get("inference", {}).get("id", record["id"]), "status": "completed",
            "fields": {"prompt": asked_of(record), **answers}, "metadata": {}, "suggestions": {},
            "responses": {question: [response]},
        }
    ]  # fmt: skip


def _question(record: Tree) -> tuple[str, Any, dict[str, str]]:
    """(question, answer to it, fields)."""
    kind = record["kind"]
    if kind == "comparison":
        return _ranking(record)
    answers = {"response": answer_of(record)} if record.get("output") else {}
    if kind == "boolean":
        return record["metric"], "yes" if record["value"] else "no", answers
    if kind == "float":
        if not float(record["value"]).is_integer() or not 0 <= record["value"] <= 10:
            raise CannotExpress("Argilla rates in whole numbers from 0 to 10")
        return record["metric"], int(record["value"]), answers
    if kind == "categorical":
        if judgement_of(record["value"]) is not None or record["metric"] in (*COMMENTS, *TEXTS):
            raise CannotExpress("a category yes or no would come back as a judgement")
        return record["metric"], record["value"], answers
    if kind == "demonstration":
        return "correction", only(record["value"], "value"), answers
    if kind == "comment":
        return "comment", record.get("comment") or record.get("value"), answers
    raise CannotExpress(f"Argilla has no question for a {kind}")


def _ranking(record: Tree) -> tuple[str, list[str], dict[str, str]]:
    answers = {str(each["id"]): only(each["messages"], "outputs") for each in record["outputs"]}
    best, worst = record["value"]["chosen"], record["value"]["rejected"]
    between = [name for name in answers if name not in (best, worst)]
    return "preference", [best, *between, worst], answers


def _carry(row: Tree, own: Tree) -> None:
    row["metadata"]["eternad"] = msgspec.json.encode(own).decode()


def _carried(row: Tree) -> Tree:
    kept = (row.get("metadata") or {}).get("eternad")
    own = msgspec.json.decode(kept) if isinstance(kept, str) else {}
    return own if isinstance(own, dict) else {}


TOOL = Tool(read, write, _carry, _carried)
