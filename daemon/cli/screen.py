"""What is printed: plain lines when piped, colour and tables on a terminal, JSON on request.

rich is imported only where it shows.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from daemon.wording import ago, clock, duration, safe, safe_lines, size, version

__all__ = [
    "ago", "bar", "clock", "duration", "is_terminal", "json", "safe", "safe_lines", "say", "size", "style", "table",
    "version",
]  # fmt: skip

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "36"}


def is_terminal() -> bool:
    """Whether a person looks at stdout."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def style(text: str, *names: str) -> str:
    """`text` with ANSI colours, on a terminal and without NO_COLOR (https://no-color.org)."""
    if not is_terminal() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{';'.join(_STYLES[name] for name in names)}m{text}\x1b[0m"


def say(text: str = "") -> None:
    """One line for a person."""
    print(text, flush=True)


def json(value: Any) -> None:
    """Any struct, as indented JSON."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """Aligned columns; `empty` is said instead of a table without rows."""
    if not rows:
        return say(empty)
    if not is_terminal():
        return _plain(headers, rows)
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(*headers, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        shown.add_row(*(Text.from_ansi(cell) for cell in row))
    Console().print(shown)


def _plain(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    for row in (headers, *rows):
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def bar(share: float, width: int = 20) -> str:
    """`########------------`, in blocks on a terminal."""
    full, empty = ("█", "░") if is_terminal() else ("#", "-")
    filled = round(min(max(share, 0.0), 1.0) * width)
    return full * filled + empty * (width - filled)
