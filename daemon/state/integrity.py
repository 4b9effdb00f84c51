"""Whether the database is whole, and a copy of it while it is written to."""

import os
import sqlite3
import time
from pathlib import Path

from daemon.state.database import Connection

STEPS_BETWEEN_LOOKS = 20_000
"""Of SQLite's virtual machine: about a millisecond."""


class DamagedDatabase(Exception):
    """SQLite finds the file inconsistent; the message says where."""


def problems(connection: Connection) -> list[str]:
    """Everything that `integrity_check` finds, at most 100 lines; empty for a whole database."""
    try:
        found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(100)")]
    except sqlite3.DatabaseError as error:
        return [str(error)]
    return [] if found == ["ok"] else found


def check_quickly(connection: Connection, seconds: float) -> None:
    """Look through as much of the database as can be done in `seconds`; raises `DamagedDatabase`."""
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: int(time.monotonic() > deadline), STEPS_BETWEEN_LOOKS)
    try:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
            return  # nothing was found in the time given; `eternad doctor` takes all that it needs
        raise
    finally:
        connection.set_progress_handler(None, 0)
    if found != "ok":
        raise DamagedDatabase(str(found))


def copy(connection: Connection, target: Path) -> None:
    """A consistent copy by SQLite's online backup: the daemon may go on writing. The copy needs no log beside it."""
    into = sqlite3.connect(target, isolation_level=None)
    try:
        connection.backup(into, pages=1000, sleep=0.01)
        into.execute("PRAGMA journal_mode=DELETE")
    finally:
        into.close()
    with target.open("rb") as file:
        os.fsync(file.fileno())
