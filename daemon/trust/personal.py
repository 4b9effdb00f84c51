"""Personal data in what players write is taken out before anything is stored: `[email]`, `[phone]`, ...

Found by shape and confirmed by what the shape must satisfy: phone numbers by the numbering plans of `phonenumbers`,
IBANs and cards by their check digits (`stdnum`), addresses by `ipaddress`. Names are not recognised: that needs a
language model, and a story is full of names that must stay.
"""

import ipaddress
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from daemon.trust.policy import Personal

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[^\W\d_]{2,24}")
_IBAN = re.compile(r"\b[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]{4}){2,7}(?:[ -]?[A-Za-z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)")
_DIGITS = re.compile(r"\+\d|\d(?:[\s()./-]{0,2}\d){6}")
"""Without seven digits in a row, or a plus before one, there is no phone number to look for."""


def _email(text: str) -> Iterator[tuple[int, int]]:
    yield from (found.span() for found in _EMAIL.finditer(text)) if "@" in text else ()


def _iban(text: str) -> Iterator[tuple[int, int]]:
    for found in _IBAN.finditer(text):
        from stdnum import iban

        if iban.is_valid(found[0]):
            yield found.span()


def _card(text: str) -> Iterator[tuple[int, int]]:
    for found in _CARD.finditer(text):
        from stdnum import luhn

        if luhn.is_valid(re.sub(r"\D", "", found[0])) and found[0][0] in "3456":
            yield found.span()


def _phone(text: str) -> Iterator[tuple[int, int]]:
    if _DIGITS.search(text):
        from phonenumbers import Leniency, PhoneNumberMatcher

        # in the international form, or as it is written in one of these countries
        for region, leniency in ((None, Leniency.VALID), *((each, Leniency.STRICT_GROUPING) for each in REGIONS)):
            for found in PhoneNumberMatcher(text, region, leniency=leniency, max_tries=TRIES_MAX):
                yield found.start, found.end


REGIONS = ("US", "DE", "GB", "ES")
TRIES_MAX = 200
"""A text of nothing but digits has no claim to more time than this."""


def _ip(text: str) -> Iterator[tuple[int, int]]:
    for found in _IP.finditer(text):
        try:
            ipaddress.ip_address(found[0])
        except ValueError:
            continue
        yield found.span()


_FINDERS: dict[Personal, Callable[[str], Iterator[tuple[int, int]]]] = {
    "email": _email, "iban": _iban, "credit_card": _card, "ip": _ip, "phone": _phone,
}  # fmt: skip
_SUSPICIOUS = re.compile(r"@|\+\d|\d\.\d|:[^:]*+:|\d(?:\D*+\d){6}")
"""Most texts hold nothing that could be personal data; they cost one search."""


def redact(text: str, kinds: Collection[Personal]) -> str:
    """The text with `[email]` and the like in the place of what was found."""
    if not kinds or not _SUSPICIOUS.search(text):
        return text
    for kind, find in _FINDERS.items():
        if kind in kinds:
            text = _without(text, sorted(find(text)), f"[{kind}]")
    return text


def _without(text: str, places: list[tuple[int, int]], mark: str) -> str:
    """Places may overlap: two countries may know the same number."""
    parts, at = [], 0
    for start, end in places:
        if start >= at:
            parts += [text[at:start], mark]
        at = max(at, end)
    return "".join(parts) + text[at:]


_KEPT = frozenset(
    ("schema", "id", "ts", "kind", "model", "subject", "source", "inference", "metric", "consent", "role", "chosen",
     "rejected", "name", "tools")
)  # fmt: skip
"""Keys whose values are no free text; a pseudonym is full of digits."""


def redact_tree(tree: dict[str, Any], kinds: Collection[Personal]) -> dict[str, Any]:
    """A feedback record without personal data in any of its texts; the same object when there is none."""
    kept = _KEPT | {"value"} if tree.get("kind") == "retraction" else _KEPT
    if not kinds or not any(_is_suspicious(value) for key, value in tree.items() if key not in kept):
        return tree
    changed = {key: value if key in kept else _redacted(value, kinds) for key, value in tree.items()}
    return tree if changed == tree else changed


def _is_suspicious(value: Any) -> bool:
    if isinstance(value, str):
        return _SUSPICIOUS.search(value) is not None
    if isinstance(value, list):
        return any(map(_is_suspicious, value))
    return isinstance(value, dict) and any(_is_suspicious(each) for key, each in value.items() if key not in _KEPT)


def _redacted(value: Any, kinds: Collection[Personal]) -> Any:
    if isinstance(value, str):
        return redact(value, kinds)
    if isinstance(value, list):
        return [_redacted(each, kinds) for each in value]
    if isinstance(value, dict):
        return {key: each if key in _KEPT else _redacted(each, kinds) for key, each in value.items()}
    return value
