"""Rows and their JSON: what one line of a content file means, and what is refused with which reason."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.example import Example, Message
from daemon.ingest import rows, strict_json
from daemon.ingest.lines import read_lines
from daemon.ingest.problem import Problem

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def asked(question: str, answer: str) -> Example:
    """A demonstration of one question."""
    return Example(shape="demonstration", prompt=(Message("user", question),), completion=answer)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "Once."}, Example(shape="text", completion="Once.")),
        ({"prompt": "Who?", "completion": "I."}, asked("Who?", "I.")),
        (
            {"raw_prompt": "He said:", "completion": " I."},
            Example(shape="demonstration", prompt="He said:", completion=" I."),
        ),
        (
            {"prompt": "He said:", "raw": True, "completion": " I."},
            Example(shape="demonstration", prompt="He said:", completion=" I."),
        ),
        (
            {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]},
            asked("Who?", "I."),
        ),
        (
            {"prompt": [{"role": "user", "content": "Who?"}], "completion": [{"role": "assistant", "content": "I."}]},
            asked("Who?", "I."),
        ),
        (
            {"prompt": "Who?", "completion": "I.", "label": False},
            Example(shape="boolean", prompt=(Message("user", "Who?"),), completion="I.", label=False),
        ),
        (
            {"prompt": "Who?", "chosen": "I.", "rejected": "You."},
            Example(shape="comparison", prompt=(Message("user", "Who?"),), completion="I.", rejected="You."),
        ),
        (
            {
                "chosen": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}],
                "rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "You."}],
            },
            Example(shape="comparison", prompt=(Message("user", "Who?"),), completion="I.", rejected="You."),
        ),
        (
            {
                "input": {
                    "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
                },
                "preferred_output": [{"role": "assistant", "content": "I."}],
                "non_preferred_output": [{"role": "assistant", "content": "You."}],
            },
            Example(
                shape="comparison", prompt=(Message("system", "Be brief."), Message("user", "Who?")), completion="I.",
                rejected="You.",
            ),
        ),
    ],
)  # fmt: skip
def test_rows_of_trl_and_openai_are_read_as_they_are(row: dict[str, Any], wanted: Example) -> None:
    """Data sets that exist need no conversion."""
    assert rows.example_of(row) == wanted


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "a row is an object"),
        ({"txt": "x"}, "this one has txt"),
        ({"text": " "}, "`text` must be a text"),
        ({"prompt": "x", "completion": "y", "label": 1}, "`label` must be true or false"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last of them the assistant's"),
        ({"messages": [{"role": "user", "content": None}]}, "Expected `str`, got `null`"),
        ({"prompt": "x", "chosen": "y"}, "`rejected` must be a text"),
        ({"prompt": "x", "chosen": [{"role": "assistant", "content": "y"}],
          "rejected": [{"role": "assistant", "content": "y"}]}, "are the same"),
        ({"input": [], "preferred_output": []}, "`input` must be an object"),
    ],
)  # fmt: skip
def test_a_bad_row_says_what_is_wrong_with_it(row: Any, reason: str) -> None:
    """The message names the key."""
    with pytest.raises(Problem, match=reason.replace("`", ".")) as raised:
        rows.example_of(row)
    assert raised.value.code == "bad_row"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"a": NaN}', "not_finite"),
        (b'{"a": 1e999}', "not_finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "huge_integer"),
        (b'{"a": 18446744073709551616}', "huge_integer"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b'{"a\\"": "\\\\", "a\\"": 2}', "duplicate_key"),
        (b'{"a": {"b": [1, {"c": 1, "c": 1}]}}', "duplicate_key"),
        (b'{"a": "\\ud800"}', "lone_surrogate"),
        (b'{"\\udfff": 1}', "lone_surrogate"),
        (b'{"a": "\xff"}', "invalid_utf8"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8"),
        (b"[" * 100_000, "too_deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "too_deep"),
        (b'{"a": 1', "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b'{"a": 1} {"b": 2}', "invalid_json"),
        (b'"\x00"', "invalid_json"),
    ],
)
def test_json_that_is_not_json_is_refused_with_a_code(line: bytes, code: str) -> None:
    """What lenient readers accept means different things to different programs."""
    with pytest.raises(Problem) as raised:
        strict_json.parse(line)
    assert raised.value.code == code


def test_json_that_only_looks_odd_is_read() -> None:
    """Brackets in strings are not depth, and U+2028 is a character like any other."""
    assert strict_json.parse(b'["' + b"[" * 1000 + b'"]') == ["[" * 1000]
    assert strict_json.parse('{"a": "\u2028", "b": "\\ud83d\\ude00"}'.encode()) == {"a": "\u2028", "b": "😀"}
    assert strict_json.parse(b" [18446744073709551615, -9223372036854775808] ") == [2**64 - 1, -(2**63)]


@settings(max_examples=200, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_strict_json_reads_what_the_standard_library_writes(value: Any, ascii_only: bool, indent: int | None) -> None:
    """Every legal value comes through, however it is written, and has one canonical form."""
    import json

    line = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    read, canonical = strict_json.parse_canonical(line)
    assert read == value
    assert strict_json.parse_canonical(canonical) == (value, canonical)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | VALUES.map(msgspec.json.encode).flatmap(
    lambda line: st.tuples(st.integers(0, len(line)), st.binary(max_size=3)).map(
        lambda cut: line[: cut[0]] + cut[1] + line[cut[0] :])))  # fmt: skip
def test_any_bytes_are_read_or_refused(line: bytes) -> None:
    """The reader never fails in any other way than with a `Problem`."""
    try:
        strict_json.parse_canonical(line)
    except Problem as problem:
        assert problem.code and problem.message


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """U+2028, U+0085, a form feed and a lone carriage return stand inside lines; the last line needs its end."""
    path = tmp_path / "lines"
    path.write_bytes("a\u2028b\u0085c\x0cd\re\r\nf\n\ng".encode())
    with path.open("rb") as file:
        found = list(read_lines(file.fileno(), line_bytes_max=100))
        assert [line.body for line in found] == ["a\u2028b\u0085c\x0cd\re".encode(), b"f", b""]
        again = list(read_lines(file.fileno(), found[1].offset, 2, line_bytes_max=100, open_end=True))
    assert [(line.number, line.body) for line in again] == [(2, b"f"), (3, b""), (4, b"g")]
