"""Past updates played again: a copy of a model's journal in memory, in which they have not happened yet.

A search tries its settings on what the model has learned before. The copy never touches the disk, so that erasing a
person's data has one place less to look at; the journal itself is only read.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from buffers import journal

_COLUMNS = (
    "id, model, hash, prompt_hash, shape, body, characters, split, state, run_id, update_number, collection, source,"
    " subject, record_id, origin_file, origin_line, weight, failures, copies, ingested_at"
)


@contextmanager
def rehearsal(connection: sqlite3.Connection, model: str, updates: list[int]) -> Iterator[sqlite3.Connection]:
    """A life that begins with the first of `updates`: what they taught waits, earlier and later ones are not there."""
    copy = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for _, script in journal.MIGRATIONS:
            copy.executescript(script)
        found = connection.execute(
            f"SELECT {_COLUMNS} FROM example WHERE model = ? AND ((split = 'eval' AND state <> 'retracted')"
            f" OR (state = 'consumed' AND update_number IN ({', '.join('?' * len(updates))})))",
            (model, *updates),
        )
        places = ", ".join("?" * len(_COLUMNS.split(",")))
        copy.executemany(f"INSERT INTO example ({_COLUMNS}) VALUES ({places})", found)
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
