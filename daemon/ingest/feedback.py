"""The feedback record `eternad.feedback/1`: one JSON object per line, read strictly (see `docs/feedback.md`).

A record says what somebody did; it can never carry a weight, a trust, a priority or a path. Unknown fields are kept
with the record and mean nothing.
"""

import math
import re
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec

from buffers.example import Example, Message
from daemon.ingest.problem import Problem
from daemon.ingest.rows import compare, from_conversation

SCHEMA = "eternad.feedback/1"
Kind = Literal["demonstration", "comparison", "boolean", "float", "categorical", "comment", "retraction"]
Slug = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
RecordId = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^(?:[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-7[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}"
        r"|[0-7][0-9A-HJKMNP-TV-Z]{25})$",
        description="UUIDv7 or ULID: the producer's idempotency key",
    ),
]
SubjectId = Annotated[
    str, msgspec.Meta(pattern=r"^h:[A-Za-z0-9_-]{8,128}$", description="pseudonym: `h:` + the producer's HMAC")
]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Remark = Annotated[str, msgspec.Meta(max_length=4096)]


class Inference(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Which answer the record is about."""

    id: Name
    episode_id: Name | None = None
    turn: Annotated[int, msgspec.Meta(ge=0)] | None = None
    adapter: Name | None = None
    """The version that answered, as the engine names it."""


class Input(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What the model was asked."""

    messages: Annotated[tuple[Message, ...], msgspec.Meta(min_length=1)]
    tools: list[Any] | None = None


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What was shown."""

    messages: Annotated[tuple[Message, ...], msgspec.Meta(min_length=1)]
    id: Name | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Which of the shown outputs was preferred, by their ids."""

    chosen: Name
    rejected: Name
    strength: float | None = None


class Subject(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The pseudonymous person."""

    id: SubjectId
    session: Name | None = None


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What the producer claims; trust comes from the directory that the record was dropped in."""

    app: Name
    channel: Name
    reporter: Literal["player", "staff", "heuristic", "model"]


class Consent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What the person agreed to."""

    basis: Name
    scope: list[Literal["train", "eval"]]
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One line of a feedback file."""

    schema: str
    id: RecordId
    ts: Annotated[datetime, msgspec.Meta(tz=True)]
    """RFC 3339, UTC; informational: the time of ingest counts."""
    kind: Kind
    model: Slug
    subject: Subject
    source: Source
    inference: Inference | None = None
    input: Input | None = None
    output: Output | None = None
    outputs: Annotated[list[Output], msgspec.Meta(min_length=2, max_length=16)] | None = None
    metric: Slug | None = None
    value: Any = None
    consent: Consent | None = None
    tags: dict[str, str | int | float | bool] | list[Name] | None = None
    comment: Remark | None = None


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a record, published as `docs/feedback.schema.json`."""
    schema: dict[str, Any] = msgspec.json.schema(Record)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA, **schema}


FIELDS = frozenset(Record.__struct_fields__)


def read(tree: Any, model: str) -> Record:
    """A record out of parsed JSON; raises `Problem` with what is wrong and at which key."""
    if not isinstance(tree, dict):
        raise Problem("bad_record", "a feedback record is a JSON object")
    _check_schema(tree.get("schema"))
    _check_subject(tree.get("subject"))
    try:
        record = msgspec.convert(tree, Record, strict=True)
    except msgspec.ValidationError as error:
        raise Problem("bad_record", str(error)) from None
    if record.ts.utcoffset():
        raise Problem("bad_record", f"`ts` must be UTC (`...Z`), not {record.ts.isoformat()}")
    if record.model != model:
        raise Problem(
            "model_mismatch",
            f"the record is for `{record.model}` and was dropped below feedback/{model}/: drop it where it belongs",
        )
    return record


def extra(tree: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record that this schema does not know."""
    return {key: value for key, value in tree.items() if key not in FIELDS}


_MINOR = re.compile(rf"{re.escape(SCHEMA)}\.\d{{1,4}}")


def _check_schema(schema: Any) -> None:
    if schema == SCHEMA or (isinstance(schema, str) and _MINOR.fullmatch(schema)):
        return
    raise Problem(
        "unknown_schema",
        f"`schema` is {str(schema)[:64]!r}: this eternad reads {SCHEMA!r}; upgrade it, or write that one",
        retryable=True,
    )  # fmt: skip


def _check_subject(subject: Any) -> None:
    identity = subject.get("id") if isinstance(subject, dict) else None
    if isinstance(identity, str) and not identity.startswith("h:"):
        # the value itself is not repeated: it may well be somebody's address
        raise Problem(
            "raw_subject",
            "`subject.id` is no pseudonym: the producer must send `h:` + an HMAC of the person's id, never the id,"
            " a name or an address",
        )


def identity(record: Record) -> str:
    """The id in the one form in which it is compared: UUIDs in lower case, ULIDs in upper case as they are."""
    return record.id.lower() if "-" in record.id else record.id


def examples_of(record: Record) -> list[Example]:
    """What can be learned from a record: none for kinds that are only stored; raises `Problem` for a broken one.

    demonstration -> `demonstration`, and a `comparison` with the answer that was shown; comparison -> `comparison`;
    boolean -> `boolean`. What a float says depends on others (`daemon.ingest.ratings`); categories and comments slice
    evaluations and feed the review queue.
    """
    try:
        return _READERS[record.kind](record)
    except ValueError as error:
        raise Problem("bad_record", f"{record.kind}: {error}") from None


def _demonstration(record: Record) -> list[Example]:
    asked = _asked(record)
    wanted = from_conversation((*asked, *_value_messages(record.value)))
    if record.output is None:
        return [wanted]
    shown = from_conversation((*asked, *record.output.messages))
    if shown.prompt != wanted.prompt or shown.completion == wanted.completion:
        return [wanted]
    pair = Example(shape="comparison", prompt=wanted.prompt, completion=wanted.completion, rejected=shown.completion)
    return [wanted, pair]


def _comparison(record: Record) -> list[Example]:
    asked = _asked(record)
    if record.outputs is None:
        raise ValueError("`outputs` is missing: two or more answers, each with an `id`")
    try:
        choice = msgspec.convert(record.value, Choice, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"`value` must be {{chosen, rejected, strength?}} with ids of `outputs`: {error}") from None
    if choice.strength is not None and not math.isfinite(choice.strength):
        raise ValueError("`value.strength` must be finite")
    shown = {each.id: each.messages for each in record.outputs if each.id is not None}
    if len(shown) != len(record.outputs):
        raise ValueError("every one of `outputs` needs an `id` of its own")
    for wanted in (choice.chosen, choice.rejected):
        if wanted not in shown:
            raise ValueError(f"`value` names the output {wanted[:64]!r}, and `outputs` has {sorted(map(str, shown))}")
    return [compare((*asked, *shown[choice.chosen]), (*asked, *shown[choice.rejected]))]


def _boolean(record: Record) -> list[Example]:
    asked = _asked(record)
    if record.output is None:
        raise ValueError("`output` is missing: the answer that was judged")
    _need_metric(record)
    if not isinstance(record.value, bool):
        raise ValueError("`value` must be true (good) or false (bad)")
    return [from_conversation((*asked, *record.output.messages), record.value)]


def _float(record: Record) -> list[Example]:
    _asked(record)
    _need_metric(record)
    if isinstance(record.value, bool) or not isinstance(record.value, int | float) or not math.isfinite(record.value):
        raise ValueError("`value` must be a finite number")
    if record.output is not None:
        from_conversation((*_asked(record), *record.output.messages))
    return []


def _categorical(record: Record) -> list[Example]:
    _asked(record)
    _need_metric(record)
    if not isinstance(record.value, str) or not 0 < len(record.value) <= 256:
        raise ValueError("`value` must be the name of a category (1 to 256 characters)")
    return []


def _comment(record: Record) -> list[Example]:
    said = record.comment if record.value is None else record.value
    if not isinstance(said, str) or not said.strip() or len(said) > 4096:
        raise ValueError("`comment` (or `value`) must be a text of 1 to 4096 characters")
    return []


def _retraction(record: Record) -> list[Example]:
    withdrawn(record)
    return []


def withdrawn(record: Record) -> str:
    """The id of the record that a retraction withdraws; raises `ValueError`."""
    try:
        target = msgspec.convert(record.value, RecordId, strict=True)
    except msgspec.ValidationError:
        raise ValueError("`value` must be the id of the record that is withdrawn") from None
    return target.lower() if "-" in target else target


_READERS = {
    "demonstration": _demonstration, "comparison": _comparison, "boolean": _boolean, "float": _float,
    "categorical": _categorical, "comment": _comment, "retraction": _retraction,
}  # fmt: skip


def _asked(record: Record) -> tuple[Message, ...]:
    if record.input is None:
        raise ValueError("`input` is missing: the messages that were answered")
    return record.input.messages


def _need_metric(record: Record) -> None:
    if record.metric is None:
        raise ValueError("`metric` is missing: what was judged, e.g. `thumb`")


def _value_messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        return (Message("assistant", value),)
    if not isinstance(value, list) or not value:
        raise ValueError("`value` must be the better answer: a text, or a list of messages")
    try:
        return msgspec.convert(value, tuple[Message, ...], strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"`value`: {error}") from None
