"""Log lines for the journal and for a terminal."""

import io
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.log import JournalHandler, LineFormatter, about, configure, escape, is_journal, priority


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, as it was before once the test is over."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def record(message: str, level: int = logging.WARNING, error: BaseException | None = None) -> logging.LogRecord:
    """A record of the logger `daemon.watch`."""
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("daemon.watch", level, __file__, 1, message, None, info)


def test_priorities_follow_syslog() -> None:
    """Levels map to the priorities of RFC 5424; levels between two belong to the lower one."""
    levels = (logging.CRITICAL, logging.ERROR, logging.WARNING, 25, logging.INFO, logging.DEBUG)
    assert [priority(level) for level in levels] == [2, 3, 4, 6, 6, 7]


def test_journal_line_has_its_priority() -> None:
    """In the journal a line is priority, logger and message: time and unit are the journal's."""
    assert LineFormatter(journal=True).format(record("scan took 3 s")) == "<4>daemon.watch: scan took 3 s"


def test_a_message_stays_on_one_line() -> None:
    """A file name with a line break cannot forge a line of its own, with a priority of its choice."""
    line = LineFormatter(journal=True).format(record("new file: a\n<0>the disk is on fire\x1b[2J\u202egpj.exe\u2028x"))
    assert line.splitlines() == [line]
    assert "a\\x0a<0>the disk" in line
    assert "\\x1b[2J\\u202egpj.exe\\u2028x" in line


def test_every_line_of_a_traceback_has_the_priority() -> None:
    """A traceback keeps its lines, each with the priority of its record, whatever the error's text holds."""
    try:
        raise ValueError("bad\n<0>forged\x07")
    except ValueError as error:
        lines = LineFormatter(journal=True).format(record("failed", logging.ERROR, error)).splitlines()
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines)
    assert "<3><0>forged\\x07" in lines


def test_escape_shows_bytes_that_are_not_utf8() -> None:
    """A surrogate-escaped file name can be written to any stream."""
    assert escape("caf\udce9 é") == "caf\\udce9 é"


def entry(datagram: bytes) -> dict[str, str]:
    """Read as journald reads it: name, length, value."""
    found = {}
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        length = int.from_bytes(rest[:8], "little")
        found[name.decode()] = rest[8 : 8 + length].decode()
        assert rest[8 + length : 9 + length] == b"\n"
        datagram = rest[9 + length :]
    return found


def test_an_entry_has_fields_that_nothing_said_can_forge(tmp_path: Path) -> None:
    """Run, model or file stand in fields of their own; a line break in a message begins none, and no line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "socket"))
        handler = JournalHandler(io.StringIO(), "eternad", tmp_path / "socket")
        said = record("new file: a\nPRIORITY=0")
        said.__dict__.update(about(run="npc-00003", version=None))
        handler.emit(said)
        handler.close()
        found = entry(journal.recv(65536))
    assert found == {
        "MESSAGE": "daemon.watch: new file: a\\x0aPRIORITY=0",
        "PRIORITY": "4", "SYSLOG_IDENTIFIER": "eternad", "ETERNAD_LOGGER": "daemon.watch", "ETERNAD_RUN": "npc-00003",
    }  # fmt: skip


def test_what_the_journals_socket_does_not_take_is_a_line(tmp_path: Path) -> None:
    """No socket, or a text that is too long for it: nothing is lost."""
    stream = io.StringIO()
    handler = JournalHandler(stream, "eternad", tmp_path / "nowhere")
    handler.emit(record("scan took 3 s"))
    handler.close()
    assert stream.getvalue() == "<4>daemon.watch: scan took 3 s\n"


def test_console_line_has_time_and_level() -> None:
    """Anywhere else the line says when and how bad in words."""
    line = LineFormatter(journal=False).format(record("x"))
    assert line.split(" ", 1)[1] == "WARNING daemon.watch: x"


def test_the_journal_is_recognised_by_its_inode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the very stream that JOURNAL_STREAM names counts: a redirected stderr gets no prefixes."""
    with (tmp_path / "stream").open("w") as stream, (tmp_path / "other").open("w") as other:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert is_journal(stream)
        assert not is_journal(other)
    assert not is_journal(io.StringIO())
    assert not is_journal(stream)


def test_configure_writes_to_the_stream(root_logger: logging.Logger) -> None:
    """Records of the level and above are written; a second call replaces the first."""
    first, second = io.StringIO(), io.StringIO()
    configure("warning", first)
    configure("info", second)
    logging.getLogger("daemon.x").info("hello")
    logging.getLogger("daemon.x").debug("not this")
    logging.getLogger("httpx").info("nor a line for every request to an engine")
    assert first.getvalue() == ""
    assert second.getvalue().endswith("INFO daemon.x: hello\n")


def test_configure_refuses_an_unknown_level(root_logger: logging.Logger) -> None:
    """A misspelt level is an error, not silence."""
    with pytest.raises(ValueError, match="LOUD"):
        configure("loud", io.StringIO())
