"""What all tools share: who and when, pseudonyms, and messages in the several forms in which tools keep them."""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

SCHEMA = "eternad.feedback/1"
Tree = dict[str, Any]
_PSEUDONYM = re.compile(r"h:[A-Za-z0-9_-]{8,128}")
_PROMPTS = ("prompt", "messages", "chat", "instruction", "question", "input")
_YES, _NO = ("yes", "true", "good", "thumbs_up"), ("no", "false", "bad", "thumbs_down")


class CannotExpress(ValueError):
    """A tool's rows have no words for this record."""


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """What the rows of a tool do not say about the records that they become."""

    tool: str
    model: str
    channel: str = "import"
    reporter: str = "player"
    key: bytes = b""
    """Pseudonyms are made of people's names with it (HMAC-SHA-256); rows that name nobody need none."""
    now: float = 0.0
    """The time of records whose rows tell none."""

    def record(self, kind: str, at: object, person: object, *identity: object) -> Tree:
        """The fields that every record has; the same row gives the same id again."""
        moment = self.moment(at)
        milliseconds = int(moment.timestamp() * 1000) if at else 0
        return {
            "schema": SCHEMA, "id": _uuid7(milliseconds, f"{self.tool}\x1f{identity}"), "ts": _written(moment),
            "kind": kind, "model": self.model, "subject": {"id": self.subject(person)},
            "source": {"app": self.tool, "channel": self.channel, "reporter": self.reporter},
        }  # fmt: skip

    def subject(self, person: object) -> str:
        """The pseudonym of a person; rows that name nobody are of one subject. Raises `ValueError` without a key."""
        if person is None or person == "":
            return f"h:nobody-of-{self.tool}"
        if _PSEUDONYM.fullmatch(str(person)):
            return str(person)
        if not self.key:
            raise ValueError("it names a person: give `--subject-key FILE`, of which the pseudonym is made")
        return f"h:{hmac.new(self.key, f'{self.tool}:{person}'.encode(), hashlib.sha256).hexdigest()[:32]}"

    def moment(self, at: object) -> datetime:
        """A time as tools write it: ISO 8601, or seconds."""
        if isinstance(at, str) and at:
            parsed = datetime.fromisoformat(at)
            return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).astimezone(UTC)
        return datetime.fromtimestamp(at if isinstance(at, int | float) else self.now, UTC)


class Tool(msgspec.Struct, frozen=True):
    """How one tool's rows are read and written."""

    read: Callable[[Tree, Frame, dict[str, Any]], Iterator[Tree]]
    """Records of one row; rows that belong together are remembered in the state."""
    write: Callable[[Tree], list[Tree]]
    """Rows of one record; raises `CannotExpress`."""
    carry: Callable[[Tree, Tree], None] | None = None
    """Put what the row has no place for into its metadata."""
    carried: Callable[[Tree], Tree] = lambda _: {}
    """The inverse."""


def _uuid7(milliseconds: int, name: str) -> str:
    """RFC 9562, 5.7, with a hash in the place of chance."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    head = f"{max(milliseconds, 0):012x}"[-12:]
    return f"{head[:8]}-{head[8:]}-7{digest[:3]}-8{digest[3:6]}-{digest[6:18]}"


def _written(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def is_same(one: object, other: object) -> bool:
    """Whether two values are one and the same JSON: `true` is not 1."""
    encode = msgspec.json.Encoder(order="deterministic").encode
    return encode(one) == encode(other)


def number_of(value: object) -> int | float:
    """A number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a number is expected, not {str(value)[:64]!r}")
    return value


def slug(name: object) -> str:
    """A metric's name as records may have it."""
    made = re.sub(r"[^a-z0-9._-]+", "-", str(name).lower()).strip("-._")[:64]
    if not made:
        raise ValueError(f"{str(name)[:64]!r} is no name of a metric")
    return made


def text_of(content: object) -> str:
    """Text that may stand in blocks `{"type": "text", "text": ...}`."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        return "".join(_block(each) for each in content)
    raise ValueError("text is expected, or blocks of it; other contents cannot be learned from")


def _block(block: object) -> str:
    if isinstance(block, dict) and block.get("type") in ("text", "input_text", "output_text"):
        return str(block.get("text", block.get("value", "")))
    raise ValueError(f"a block of text is expected, not {str(block)[:80]}")


def conversation(value: object, role: str) -> list[Tree]:
    """Chat messages out of a text (said by `role`), one message, a list of them, or an object that holds them."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        if isinstance(value.get("messages"), list):
            return conversation(value["messages"], role)
        if isinstance(value.get("choices"), list):
            return conversation(value["choices"][0]["message"], role)
        return [_message(value, role)]
    if isinstance(value, list) and value:
        return [_message(each, role) for each in value]
    raise ValueError(f"messages or a text are expected, not {str(value)[:80]}")


def _message(value: object, role: str) -> Tree:
    if not isinstance(value, dict) or "content" not in value:
        raise ValueError(f"a message has `role` and `content`, not {str(value)[:80]}")
    said = str(value.get("role", role))
    return {"role": "system" if said == "developer" else said, "content": text_of(value["content"])}


def answer_of(record: Tree) -> str:
    """The one text that was shown; raises `CannotExpress` for anything longer."""
    return only(record.get("output", {}).get("messages"), "output")


def only(messages: object, name: str) -> str:
    """The text of a conversation of one message by the assistant, or a text itself."""
    if isinstance(messages, str):
        return messages
    if not isinstance(messages, list) or len(messages) != 1 or messages[0].get("role") != "assistant":
        raise CannotExpress(f"`{name}` must be one message of the assistant")
    return str(messages[0]["content"])


def asked_of(record: Tree) -> list[Tree]:
    """The messages of the input."""
    messages = record.get("input", {}).get("messages")
    if not messages:
        raise CannotExpress("`input` is missing: what was asked")
    return list(messages)


def fields_of(fields: Tree) -> tuple[list[Tree], dict[str, list[Tree]]]:
    """(prompt, answers by name) of a table row whose columns are named by whoever made the project."""
    name = next((each for each in _PROMPTS if fields.get(each)), None)
    if name is None:
        raise ValueError(f"no field with the prompt; known names are {', '.join(_PROMPTS)}")
    others = {key: value for key, value in fields.items() if key != name and value not in (None, "")}
    return conversation(fields[name], "user"), {key: conversation(each, "assistant") for key, each in others.items()}


def judgement_of(value: object) -> bool | None:
    """Whether a choice says yes or no; None for another category."""
    said = str(value).lower()
    return True if said in _YES else False if said in _NO else None


def shown(answers: dict[str, list[Tree]]) -> Tree:
    """The one answer that was judged, as an output."""
    if len(answers) != 1:
        raise ValueError(f"one answer is expected, and there are {sorted(answers)}")
    return {"messages": next(iter(answers.values()))}
