"""Feedback to other tools and back: nothing is lost on the way, and what people change in a tool counts."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from feedback_kit import BY_KIND, record, uuid7
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from buffers.example import Example
from daemon import exchange
from daemon.cli.app import app
from daemon.exchange import CannotExpress, Frame
from daemon.ingest import feedback

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
SAID = TEXT.map(lambda text: [{"role": "assistant", "content": text}])
ASKED = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT}), min_size=1,
    max_size=3,
)  # fmt: skip
SLUG = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,9}", fullmatch=True)
NUMBERS = st.integers(-5, 12) | st.floats(-5, 5, allow_nan=False, width=32)
CONTENT: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "boolean": st.fixed_dictionaries({"metric": SLUG, "value": st.booleans()}),
    "float": st.fixed_dictionaries({"metric": SLUG, "value": NUMBERS}),
    "categorical": st.fixed_dictionaries({"metric": SLUG, "value": TEXT}),
    "demonstration": st.fixed_dictionaries({"value": TEXT | SAID}),
    "comment": st.fixed_dictionaries({"comment": TEXT}),
}


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """Good records of every kind but retractions, with and without the fields that may be missing."""
    kind = draw(st.sampled_from([*CONTENT, "comparison"]))
    whole = record(draw(st.integers(1, 2**40)), kind)
    whole["input"] = {"messages": draw(ASKED)}
    if kind == "comparison":
        answers = draw(st.lists(TEXT, min_size=2, max_size=4, unique=True))
        names = draw(st.permutations([f"answer-{number}" for number in range(len(answers))]))
        whole["outputs"] = [
            {"id": name, "messages": [{"role": "assistant", "content": answer}]}
            for name, answer in zip(names, answers, strict=True)
        ]
        whole["value"] = {"chosen": names[0], "rejected": names[1]} | draw(st.sampled_from([{}, {"strength": 0.5}]))
    else:
        whole |= {"output": {"messages": draw(SAID)}} | draw(CONTENT[kind])
    extras = {
        "consent": {"basis": "terms", "scope": ["train"]}, "tags": {"zone": "hall"}, "comment": "So it is.",
        "subject": {"id": "h:fedcba9876543210", "session": "s-1"}, "unknown": {"kept": [1, 2.0, None]},
    }  # fmt: skip
    whole |= {
        key: extras[key] for key in draw(st.sets(st.sampled_from(sorted(extras)))) if key != "comment" or kind != key
    }
    if draw(st.booleans()):
        del whole["inference"]
    return whole


def as_json(rows: Any) -> Any:
    """As it would be read from a file."""
    return json.loads(msgspec.json.encode(rows))


def back(tool: str, rows: Any) -> list[Any]:
    """What an import gives."""
    return list(exchange.records_of(tool, as_json(rows), Frame(tool=tool, model="npc")))


@pytest.mark.parametrize("tool", ["langfuse", "tensorzero", "argilla", "label-studio"])
@settings(max_examples=40)
@given(whole=records())
def test_a_record_comes_back_as_it_was(tool: str, whole: dict[str, Any]) -> None:
    """Whatever a tool can express; the rest is refused with a reason."""
    try:
        rows = exchange.rows_of(tool, whole)
    except CannotExpress:
        return
    assert as_json(back(tool, rows)) == [whole]


@pytest.mark.parametrize("tool", ["trl", "openai"])
@settings(max_examples=40)
@given(whole=records())
def test_what_is_learned_from_a_record_comes_back_from_training_rows(tool: str, whole: dict[str, Any]) -> None:
    """Rows of TRL and OpenAI hold examples, and give records of the same examples."""
    try:
        rows = exchange.rows_of(tool, whole)
    except CannotExpress:
        return
    assert [learned(each) for each in back(tool, rows)] == [[each] for each in learned(whole)]


def learned(tree: Any) -> list[Example]:
    """The examples of a record."""
    return feedback.examples_of(feedback.read(as_json(tree), "npc"))


EXPRESSED = {
    "trl": {"boolean", "demonstration", "comparison"}, "openai": {"demonstration", "comparison"},
    "langfuse": {"boolean", "demonstration", "float", "categorical", "comment"},
    "tensorzero": {"boolean", "demonstration", "float", "comment"},
    "argilla": {"boolean", "demonstration", "comparison", "float", "categorical", "comment"},
    "label-studio": {"boolean", "demonstration", "comparison", "float", "categorical", "comment"},
}  # fmt: skip


@pytest.mark.parametrize("tool", exchange.TOOLS)
def test_a_tool_expresses_the_kinds_that_it_has(tool: str) -> None:
    """No silent refusal of everything."""
    found = set()
    for kind in BY_KIND:
        whole = record(1, kind, **({"value": 3, "metric": "stars"} if kind == "float" else {}))
        whole |= {"metric": "cause"} if kind == "categorical" else {}
        try:
            found |= {kind} if exchange.rows_of(tool, whole) else set()
        except CannotExpress:
            continue
    assert found == EXPRESSED[tool]


FOREIGN: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "langfuse": (
        [
            {
                "id": "tr-1", "timestamp": "2026-11-22T20:00:00.000Z", "userId": "ann@example.org",
                "version": "npc@0007", "input": [{"role": "user", "content": "Who keeps the Library?"}],
                "output": {"role": "assistant", "content": "Nobody does."},
                "scores": [
                    {"id": "s-1", "name": "User Feedback", "dataType": "BOOLEAN", "value": 1, "stringValue": "True"},
                    {"id": "s-2", "name": "tone", "dataType": "CATEGORICAL", "stringValue": "warm", "value": 2},
                    {"id": "s-3", "name": "output", "dataType": "CORRECTION", "value": "It keeps itself."},
                ],
            }
        ],
        [
            {"kind": "boolean", "metric": "user-feedback", "value": True},
            {"kind": "categorical", "metric": "tone", "value": "warm"},
            {"kind": "demonstration", "value": "It keeps itself."},
        ],
    ),
    "tensorzero": (
        [
            {
                "id": uuid7(1), "function_name": "porter", "variant_name": "npc@0007", "episode_id": uuid7(2),
                "input": '{"system":"Brief.","messages":[{"role":"user","content":[{"type":"text","text":"Who?"}]}]}',
                "output": '[{"type":"text","text":"Nobody."}]', "tags": {"user_id": "ann@example.org"},
            },
            {"id": uuid7(3), "target_id": uuid7(1), "metric_name": "thumb", "value": False},
            {"id": uuid7(4), "target_id": uuid7(1), "metric_name": "stars", "value": 4.5},
            {"id": uuid7(5), "target_id": uuid7(1), "target_type": "inference", "value": "He was rude."},
            {"id": uuid7(6), "inference_id": uuid7(1), "value": '[{"type":"text","text":"It keeps itself."}]'},
        ],
        [
            {"kind": "boolean", "metric": "thumb", "value": False}, {"kind": "float", "metric": "stars", "value": 4.5},
            {"kind": "comment", "comment": "He was rude."}, {"kind": "demonstration", "value": "It keeps itself."},
        ],
    ),
    "argilla": (
        [
            {
                "id": "r-1", "status": "completed", "metadata": {}, "suggestions": {}, "vectors": {},
                "fields": {"instruction": "Who keeps the Library?", "first": "Nobody.", "second": "Malvo."},
                "responses": {"preference": [{"value": ["first", "second"], "user_id": "ann@example.org"}]},
            },
            {
                "id": "r-2", "fields": {"prompt": "Who?", "response": "Nobody."},
                "responses": {"quality": [{"value": 4, "user_id": "ann"}], "kind": [{"value": "no", "user_id": "ann"}]},
            },
        ],
        [
            {"kind": "comparison", "value": {"chosen": "first", "rejected": "second"}},
            {"kind": "float", "metric": "quality", "value": 4}, {"kind": "boolean", "metric": "kind", "value": False},
        ],
    ),
    "label-studio": (
        [
            {
                "id": 1, "data": {"prompt": "Who?", "answer1": "Nobody.", "answer2": "Malvo."}, "predictions": [],
                "annotations": [
                    {
                        "id": 7, "completed_by": 10, "was_cancelled": False, "created_at": "2026-11-22T20:00:00.5Z",
                        "result": [
                            {"id": "a", "from_name": "pw", "to_name": "a1,a2", "type": "pairwise",
                             "value": {"selected": "right"}},
                        ],
                    },
                    {"id": 8, "completed_by": 10, "was_cancelled": True, "result": []},
                ],
            }
        ],
        [{"kind": "comparison", "value": {"chosen": "answer2", "rejected": "answer1"}}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("tool", FOREIGN)
def test_rows_that_a_tool_wrote_itself_become_records(tool: str) -> None:
    """Of the shapes that its own documentation shows; who said it becomes a pseudonym, the same each time."""
    rows, wanted = FOREIGN[tool]
    frame = Frame(tool=tool, model="npc", key=b"0123456789abcdef", now=1_800_000_000.0)
    found: list[Any] = list(exchange.records_of(tool, rows, frame))
    assert [{key: each[key] for key in want} for each, want in zip(found, wanted, strict=True)] == wanted
    assert found == list(exchange.records_of(tool, rows, frame))
    assert all("ann" not in each["subject"]["id"] and learned(each) is not None for each in found)
    assert len({each["subject"]["id"] for each in found}) <= 2 and len({each["id"] for each in found}) == len(found)
    (keyless, *_) = exchange.records_of(tool, rows, Frame(tool=tool, model="npc"))
    assert isinstance(keyless, ValueError) and "--subject-key" in str(keyless)


@pytest.mark.parametrize("tool", exchange.TOOLS)
def test_the_row_in_the_documentation_becomes_a_record(tool: str) -> None:
    """What people copy must work."""
    page = (Path(__file__).parent.parent / "docs" / "feedback.md").read_text("utf-8")
    rows = [json.loads(line) for line in page.split(f"```json {tool}\n")[1].split("```")[0].splitlines()]
    (found,) = exchange.records_of(tool, rows, Frame(tool=tool, model="npc", key=b"0123456789abcdef"))
    assert not isinstance(found, ValueError) and feedback.read(as_json(found), "npc")


def test_what_was_changed_in_a_tool_counts() -> None:
    """What travelled beside the row does not bring the old value back."""
    (row,) = exchange.rows_of("argilla", record(1, "float", value=3.0, metric="stars"))
    row["responses"]["stars"][0]["value"] = 5
    (found,) = back("argilla", [row])
    assert found["value"] == 5 and found["id"] == uuid7(1)


@pytest.mark.parametrize("tool", exchange.TOOLS)
@settings(max_examples=40)
@given(row=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["id", "scores", "fields", "responses", "data", "annotations", "result", "value", "messages",
                         "prompt", "type", "text", "target_id", "function_name", "input", "output", "x"]),
        inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_any_row_gives_records_or_a_reason(tool: str, row: Any) -> None:
    """Nothing that a row holds ends an import."""
    for found in exchange.records_of(tool, [row, row], Frame(tool=tool, model="npc")):
        assert isinstance(found, dict | ValueError)


def test_the_commands_go_there_and_back(tmp_path: Path) -> None:
    """`feedback export` and `feedback import`; what cannot be expressed is named, and the rest written all the same."""
    kept, rows = tmp_path / "records.jsonl", tmp_path / "rows.jsonl"
    wanted = [record(1), record(2, "float")]
    kept.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in [*wanted, record(3, "retraction")]))
    out = CliRunner().invoke(app, ["feedback", "export", str(kept), "--to", "langfuse"])
    assert out.exit_code == 1 and "record 3: Langfuse has no score for a retraction" in out.stderr
    rows.write_text(f"[{','.join(out.stdout.splitlines())}]")
    came = CliRunner().invoke(app, ["feedback", "import", str(rows), "--from", "langfuse", "--model", "npc"])
    assert came.exit_code == 0, came.stderr
    assert [json.loads(line) for line in came.stdout.splitlines()] == wanted
    wrong = CliRunner().invoke(app, ["feedback", "import", str(rows), "--from", "mlflow", "--model", "npc"])
    assert wrong.exit_code != 0
