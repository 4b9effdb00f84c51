"""One row of a content `.jsonl` file as an example: the shapes of TRL and OpenAI are accepted as they are.

`{"text"}`, `{"prompt", "completion"}`, `{"messages"}`, `{"prompt", "chosen", "rejected"}`, `{"chosen", "rejected"}`
with full conversations, `{"prompt", "completion", "label"}`, `{"input", "preferred_output", "non_preferred_output"}`.
A `prompt` that is a string is what a user says, rendered with the model's chat template; `raw_prompt`, or
`"raw": true` beside it, is fed to the model as it stands.
"""

from typing import Any

import msgspec

from buffers.example import Example, Message
from daemon.ingest.problem import Problem

SHAPES = (
    "`text`; `prompt` (or `raw_prompt`) with `completion`; `messages`; `prompt` with `chosen` and `rejected`;"
    " `prompt`, `completion` and `label`; `input`, `preferred_output` and `non_preferred_output`"
)
Prompt = str | tuple[Message, ...]


def example_of(row: Any) -> Example:
    """The example of one parsed row; raises `Problem` naming the key that is wrong or missing."""
    if not isinstance(row, dict):
        raise Problem("bad_row", f"a row is an object with {SHAPES}; this is {_kind(row)}")
    if not all(isinstance(key, str) for key in row):  # YAML has others
        raise Problem("bad_row", "the keys of a row are texts: quote those that are none")
    try:
        return _shape(row)
    except (ValueError, msgspec.ValidationError) as error:
        raise Problem("bad_row", str(error)) from None


def _shape(row: dict[str, Any]) -> Example:
    if "preferred_output" in row:
        return _comparison(messages(_in(row, "input"), "messages"), row, "preferred_output", "non_preferred_output")
    if "chosen" in row:
        return _comparison(_prompt(row), row, "chosen", "rejected")
    if "messages" in row:
        return from_conversation(messages(row, "messages"), _label(row))
    if "completion" in row:
        return _completed(_prompt(row), row)
    if "text" in row:
        return Example(shape="text", completion=_text(row, "text"))
    raise ValueError(f"a row needs {SHAPES}; this one has {', '.join(sorted(row)) or 'nothing'}")


def _prompt(row: dict[str, Any]) -> Prompt:
    if "raw_prompt" in row:
        return _text(row, "raw_prompt")
    given = row.get("prompt", ())
    if isinstance(given, str):
        return given if row.get("raw") is True or not given else (Message("user", given),)
    return messages(row, "prompt") if given else ()


def _completed(prompt: Prompt, row: dict[str, Any]) -> Example:
    if isinstance(row["completion"], str):
        return _labelled(prompt or "", _text(row, "completion"), _label(row))
    return from_conversation((*_spoken(prompt), *messages(row, "completion")), _label(row))


def from_conversation(conversation: tuple[Message, ...], label: bool | None = None) -> Example:
    """The last assistant turn is what is learned; everything before it is the prompt."""
    if len(conversation) < 2 or conversation[-1].role != "assistant":
        raise ValueError("a conversation needs at least two messages, the last of them the assistant's")
    return _labelled(conversation[:-1], conversation[-1].content, label)


def _labelled(prompt: Prompt, completion: str, label: bool | None) -> Example:
    if label is None:
        return Example(shape="demonstration", prompt=prompt, completion=completion)
    return Example(shape="boolean", prompt=prompt, completion=completion, label=label)


def _comparison(prompt: Prompt, row: dict[str, Any], better: str, worse: str) -> Example:
    if isinstance(row.get(better), str):
        return Example(
            shape="comparison", prompt=prompt or "", completion=_text(row, better), rejected=_text(row, worse)
        )
    return compare((*_spoken(prompt), *messages(row, better)), (*_spoken(prompt), *messages(row, worse)))


def compare(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Example:
    """Two conversations that differ in their last assistant turn alone."""
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("two compared conversations may differ in their last message only")
    better, worse = from_conversation(chosen), from_conversation(rejected)
    if better.completion == worse.completion:
        raise ValueError("the preferred and the rejected answer are the same")
    return Example(shape="comparison", prompt=better.prompt, completion=better.completion, rejected=worse.completion)


def _spoken(prompt: Prompt) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def messages(row: dict[str, Any], key: str) -> tuple[Message, ...]:
    """A list of chat messages; OpenAI's newer role `developer` is the system's. Raises `ValueError`."""
    given = row.get(key)
    if not isinstance(given, list) or not given:
        raise ValueError(f"`{key}` must be a list of messages")
    renamed = [
        {**each, "role": "system"} if isinstance(each, dict) and each.get("role") == "developer" else each
        for each in given
    ]
    try:
        return msgspec.convert(renamed, tuple[Message, ...], strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"`{key}`: {error}") from None


def _in(row: dict[str, Any], key: str) -> dict[str, Any]:
    value = row.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"`{key}` must be an object")
    return value


def _label(row: dict[str, Any]) -> bool | None:
    label = row.get("label")
    if label is not None and not isinstance(label, bool):
        raise ValueError("`label` must be true or false")
    return label


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{key}` must be a text that is not empty")
    return value


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
