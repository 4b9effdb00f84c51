"""Past updates played again: a copy of a model's journal in memory, in which they have not happened yet.

A search tries its settings on what the model has learned before. The copy never touches the disk, so that erasing a
person's data has one place less to look at; the journal itself is only read.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from buffers import journal


@contextmanager
def rehearsal(connection: sqlite3.Connection, model: str, updates: list[int]) -> Iterator[sqlite3.Connection]:
    """A life that begins with the first of `updates`: what they taught waits, earlier and later ones are not there."""
    copy = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for _, script in journal.MIGRATIONS:
            copy.executescript(script)
        found = connection.execute(
            "SELECT * FROM example WHERE model = ? AND ((split = 'eval' AND state <> 'retracted')"
            f" OR (state = 'consumed' AND update_number IN ({', '.join('?' * len(updates))})))",
            (model, *updates),
        )
        columns = [column[0] for column in found.description]
        places = ", ".join("?" * len(columns))
        copy.executemany(f"INSERT INTO example ({', '.join(columns)}) VALUES ({places})", found)
        copy.execute("UPDATE example SET state = 'pending', run_id = NULL WHERE update_number IS NOT NULL")
        yield copy
    finally:
        copy.close()


def taught(connection: sqlite3.Connection, model: str, limit: int) -> list[int]:
    """The latest `limit` past updates that can be played again: something was trained and something held out."""
    rows = connection.execute(
        "SELECT update_number FROM example WHERE model = ? AND state = 'consumed' AND update_number IS NOT NULL"
        " GROUP BY 1 HAVING sum(split = 'train') AND sum(split = 'heldout') ORDER BY 1 DESC LIMIT ?",
        (model, limit),
    )
    return sorted(int(row[0]) for row in rows)


def begin(copy: sqlite3.Connection, update: int, run_id: str) -> None:
    """The examples of a past update are claimed by a run, as they were when it was new."""
    copy.execute("UPDATE example SET state = 'claimed', run_id = ? WHERE update_number = ?", (run_id, update))


def end(copy: sqlite3.Connection, update: int) -> None:
    """What the update taught is learned."""
    copy.execute("UPDATE example SET state = 'consumed' WHERE update_number = ?", (update,))


def fingerprint(copy: sqlite3.Connection) -> str:
    """Changes with any example that the copy holds, or the side on which it is."""
    digest = hashlib.sha256()
    for row in copy.execute("SELECT hash, split, update_number FROM example ORDER BY id"):
        digest.update(repr(row).encode())
    return digest.hexdigest()
