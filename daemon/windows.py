"""When updates may begin: times of the week, and dates on which none may. Pure functions of texts and local time.

    22:00-06:00              every night; over midnight it belongs to the day on which it begins
    mon-fri 20:00-24:00      some days
    sat,sun 00:00-24:00

Local time of the machine, as cron's. On the days when clocks change a window is an hour longer or shorter.
"""

import datetime
import re
from collections.abc import Sequence

import msgspec

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
_WINDOW = re.compile(r"(?:([a-z,-]+) )?(\d\d):(\d\d)-(\d\d):(\d\d)")
_DATES = re.compile(r"(\d{4}-\d\d-\d\d)(?:\.\.(\d{4}-\d\d-\d\d))?")


class Window(msgspec.Struct, frozen=True):
    """A time of the week. `end` is above 24 h when it reaches into the next day."""

    days: frozenset[int]
    """0 is Monday."""
    start: int
    """Minutes since midnight, as `end`."""
    end: int


def parse_window(text: str) -> Window:
    """Raises ValueError, saying what a window looks like."""
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(f"`{text}` is no window: `22:00-06:00`, or with days `mon-fri 20:00-24:00`")
    start, end = (60 * int(found[place]) + int(found[place + 1]) for place in (2, 4))
    if max(int(found[3]), int(found[5])) > 59 or start >= DAY_MINUTES or end > DAY_MINUTES or start == end:
        raise ValueError(f"`{text}`: times go from 00:00 to 24:00, and a window has a length")
    return Window(_days(found[1] or "mon-sun", text), start, end if end > start else end + DAY_MINUTES)


def _days(text: str, whole: str) -> frozenset[int]:
    days: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-") if "-" in part else (part, "", part)
        if first not in DAYS or last not in DAYS:
            raise ValueError(f"`{whole}`: days are {', '.join(DAYS)}, alone, `mon-fri` or `sat,sun`")
        begin, length = DAYS.index(first), (DAYS.index(last) - DAYS.index(first)) % 7
        days |= {(begin + offset) % 7 for offset in range(length + 1)}
    return frozenset(days)


def parse_blackout(text: str) -> tuple[datetime.date, datetime.date]:
    """First and last day; raises ValueError, saying what a blackout looks like."""
    found = _DATES.fullmatch(text)
    try:
        first, last = (datetime.date.fromisoformat(day) for day in (found[1], found[2] or found[1]))  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f"`{text}` is no blackout: `2026-12-24`, or `2026-12-24..2027-01-02`") from None
    if last < first:
        raise ValueError(f"`{text}` ends before it begins")
    return first, last


def problem(windows: Sequence[str], blackouts: Sequence[str]) -> str | None:
    """What is wrong with the texts of a configuration, or None."""
    try:
        for text in windows:
            parse_window(text)
        for text in blackouts:
            parse_blackout(text)
    except ValueError as error:
        return str(error)
    return None


def is_open(windows: Sequence[str], blackouts: Sequence[str], local: datetime.datetime) -> bool:
    """Whether an update may begin at this local time; without windows, at any time but in a blackout."""
    if _blackout(blackouts, local.date()):
        return False
    return not windows or any(_is_in(parse_window(text), local) for text in windows)


def closed_because(windows: Sequence[str], blackouts: Sequence[str], now: float) -> str | None:
    """Why none may begin now, for a person; None when it may."""
    local = datetime.datetime.fromtimestamp(now)
    if is_open(windows, blackouts, local):
        return None
    found = _blackout(blackouts, local.date())
    return f"blackout {found}" if found else f"outside its windows ({'; '.join(windows)})"


def _blackout(blackouts: Sequence[str], day: datetime.date) -> str | None:
    spans = ((text, *parse_blackout(text)) for text in blackouts)
    return next((text for text, first, last in spans if first <= day <= last), None)


def _is_in(window: Window, local: datetime.datetime) -> bool:
    minute, day = 60 * local.hour + local.minute, local.weekday()
    if day in window.days and window.start <= minute < window.end:
        return True
    return (day - 1) % 7 in window.days and minute + DAY_MINUTES < window.end
