"""Log entries with priorities and fields in the journal, lines with time and level in words elsewhere.

Where stderr is the journal, an entry goes to journald's own socket (systemd.io/JOURNAL_NATIVE_PROTOCOL), so that
`journalctl ETERNAD_RUN=npc-00003` finds all that was said of a run. What that socket does not take is written to stderr
as a line `<4>text`, whose priority journald reads off (sd-daemon(3)). A line break in a message would start a line of
its own, with a priority of the writer's choice: control characters are escaped, and each line of a traceback prefixed.
"""

import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

JOURNAL = Path("/run/systemd/journal/socket")

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

    def lines(self, record: logging.LogRecord) -> list[str]:
        """The message, and the lines of its traceback."""
        return [escape(line) for line in super().format(record).splitlines()]

    def format(self, record: logging.LogRecord) -> str:
        """The record, with its priority before every line when it goes to the journal."""
        prefix = f"<{priority(record.levelno)}>" if self._journal else ""
        return "\n".join(prefix + line for line in self.lines(record))


def about(**fields: object) -> dict[str, object]:
    """`log.info(..., extra=about(run=run.id))`: what an entry is about, in the journal its field `ETERNAD_RUN`."""
    return {"about": fields}


class JournalHandler(logging.StreamHandler[TextIO]):
    """Entries with fields for the journal; lines on `stream` when its socket takes none (too long, not there)."""

    def __init__(self, stream: TextIO, name: str, path: Path = JOURNAL) -> None:
        super().__init__(stream)
        self._lines = LineFormatter(journal=True)
        self.setFormatter(self._lines)
        self._name, self._path = name, str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one entry."""
        try:
            self._socket.sendto(_datagram(self._fields(record)), self._path)
        except OSError:
            super().emit(record)

    def close(self) -> None:
        """Let the socket go."""
        self._socket.close()
        super().close()

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        said = getattr(record, "about", {})
        return {
            "MESSAGE": "\n".join(self._lines.lines(record)),
            "PRIORITY": str(priority(record.levelno)),
            "SYSLOG_IDENTIFIER": self._name,
            "ETERNAD_LOGGER": record.name,
            **{f"ETERNAD_{field.upper()}": escape(str(value)) for field, value in said.items() if value is not None},
        }


def _datagram(fields: Mapping[str, str]) -> bytes:
    """Each field by name, length and value: no value can begin another field."""
    parts = []
    for name, text in fields.items():
        value = text.encode()
        parts.append(name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n")
    return b"".join(parts)


_CHATTY = ("httpx", "httpcore", "apscheduler")
"""Libraries with an INFO line for every request or tick: only their warnings are news."""


def configure(level: str = "INFO", stream: TextIO | None = None, name: str = "eternad") -> None:
    """Send every record of `level` and above to `stream` (default: stderr), formatted for what that stream is.

    Raises ValueError for a level that does not exist. Calling it again replaces the earlier set-up.
    """
    target = sys.stderr if stream is None else stream
    if is_journal(target):
        handler: logging.StreamHandler[TextIO] = JournalHandler(target, name)
    else:
        handler = logging.StreamHandler(target)
        handler.setFormatter(LineFormatter(journal=False))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for library in _CHATTY:
        logging.getLogger(library).setLevel(max(logging.getLogger().level, logging.WARNING))
