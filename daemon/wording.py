"""Numbers and times as a person reads them; the command line and the status page say them alike."""

import time


def duration(seconds: float) -> str:
    """`8 s`, `3 min`, `5 h`, `2 days`."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def ago(at: float | None, now: float | None = None) -> str:
    """`3 min ago`, or `never`."""
    return "never" if at is None else f"{duration((time.time() if now is None else now) - at)} ago"


def clock(at: float | None) -> str:
    """Local date and time."""
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def size(number: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def version(number: int | None) -> str:
    """`3`, or `base`."""
    return "base" if number is None or number == 0 else str(number)


def safe(text: str) -> str:
    """Text from outside (file names, reasons, answers): its control characters are shown, not obeyed."""
    from daemon.log import escape

    return escape(text)


def safe_lines(text: str) -> str:
    """Like `safe`, for text that keeps its line breaks."""
    return "\n".join(safe(line) for line in text.split("\n"))
