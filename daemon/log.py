"""Log lines with journald priorities: `<4>text` when stderr is the journal, time and level in words elsewhere.

journald reads the `<N>` of sd-daemon(3) off each line. So a line break in a message would start a line of its own, with
a priority of the writer's choice: control characters are escaped, and the lines of a traceback prefixed one by one.
"""

import logging
import os
import sys
from typing import TextIO

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Level -> syslog priority (RFC 5424, table 2); anything lower is 7, debug."""
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)
}
"""C0 and C1 controls, line separators, and the marks that reverse the direction of writing (file names carry them)."""


def escape(text: str) -> str:
    """`text` on one line, with control and direction characters and lone surrogates visible."""
    return text.translate(_ESCAPES).encode("utf-8", "backslashreplace").decode()


def priority(level: int) -> int:
    """The syslog priority of a logging level."""
    return next((number for least, number in _PRIORITIES if level >= least), 7)


def is_journal(stream: TextIO) -> bool:
    """Whether `stream` is the very socket that systemd connected to the journal (`JOURNAL_STREAM=device:inode`)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class LineFormatter(logging.Formatter):
    """One message, one line: `<N>logger: message` for the journal, `TIME LEVEL logger: message` for everything else."""

    def __init__(self, *, journal: bool) -> None:
        self._journal = journal  # which adds the time and the unit itself
        fields = "%(name)s: %(message)s" if journal else "%(asctime)s %(levelname)s %(name)s: %(message)s"
        super().__init__(fields, "%Y-%m-%dT%H:%M:%S%z")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own name)
        """The message on one line: called before the traceback is added."""
        return escape(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """The record, with its priority before every line when it goes to the journal."""
        prefix = f"<{priority(record.levelno)}>" if self._journal else ""
        return "\n".join(prefix + escape(line) for line in super().format(record).splitlines())


_CHATTY = ("httpx", "httpcore", "apscheduler")
"""Libraries with an INFO line for every request or tick: only their warnings are news."""


def configure(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send every record of `level` and above to `stream` (default: stderr), formatted for what that stream is.

    Raises ValueError for a level that does not exist. Calling it again replaces the earlier set-up.
    """
    target = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.setFormatter(LineFormatter(journal=is_journal(target)))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.getLogger().level, logging.WARNING))
