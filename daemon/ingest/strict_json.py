"""JSON as the RFC means it (RFC 8259, I-JSON: RFC 7493), for lines that strangers wrote.

The standard library accepts NaN, Infinity, duplicate keys and lone surrogates; msgspec accepts duplicate keys and
leaves deep nesting to a `RecursionError`. So depth is measured before a parser runs. msgspec, five times as fast, reads
every line that is in order; what it refuses, or may have read too kindly, goes to the strict reader, which says why.
"""

import json
import math
import re
from collections import Counter
from typing import Any

import msgspec

from daemon.ingest.problem import Problem

DEPTH_MAX = 32
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder(order="deterministic").encode


def parse(line: bytes) -> Any:
    """The value of one line; raises `Problem` with a code, a reason and the byte within the line."""
    return parse_canonical(line)[0]


def parse_canonical(line: bytes) -> tuple[Any, bytes]:
    """The value of one line, and its one canonical form: keys sorted, no blanks."""
    _check_depth(line)
    try:
        value = _decode(line)
        canonical = _encode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = _read_strictly(line)
        return value, _encode(value)
    # a member that a duplicate key has replaced has taken at least the two quotes of that key with it
    if _quotes(canonical) != _quotes(line) or _LONG_NUMBER in line.translate(_DIGITS):
        value = _read_strictly(line)
    return value, canonical


_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER = b"0" * 19


def _quotes(text: bytes) -> int:
    """How many quotes open or close a string: escaped ones do not count."""
    if b"\\" not in text:
        return text.count(b'"')
    return text.count(b'"') - text.replace(b"\\\\", b"").count(b'\\"')


def _check_depth(line: bytes) -> None:
    if line.count(b"{") + line.count(b"[") <= DEPTH_MAX:
        return
    depth = 0
    for token in _TOKENS.finditer(line):
        first = token.group()[:1]
        depth += (first in b"[{") - (first in b"]}")
        if depth > DEPTH_MAX:
            at = token.start()
            raise Problem("too_deep", f"nested deeper than {DEPTH_MAX} at byte {at} of the line", byte_offset=at)


def _read_strictly(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 at byte {error.start} of the line: write the file as UTF-8"
        raise Problem("invalid_utf8", message, byte_offset=error.start) from None
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        byte = len(text[: error.pos].encode())
        message = f"not valid JSON at byte {byte} of the line: {error.msg}"
        raise Problem("invalid_json", message, byte_offset=byte) from None
    if b"\\u" in line:
        _check_surrogates(value)
    return value


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        message = r"holds half of a surrogate pair (\ud800 to \udfff), which is no character"
        raise Problem("lone_surrogate", message) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise Problem("duplicate_key", f"the key {twice[:80]!r} stands twice in one object: which one counts?")
    return members


def _constant(name: str) -> Any:
    raise Problem("not_finite", f"{name} is not JSON: write a finite number or null")


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise Problem("not_finite", f"the number {digits[:40]} is beyond what a 64-bit float holds")
    return number


def _integer(digits: str) -> int:
    number = int(digits) if len(digits) <= 20 else 2**64  # converting 5,000 digits takes its time
    if not -(2**63) <= number < 2**64:
        raise Problem("huge_integer", f"an integer of {len(digits)} digits does not fit into 64 bits")
    return number


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_integer)
