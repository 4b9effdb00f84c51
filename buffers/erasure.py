"""Forget a subject: its examples leave the journal, and with it every buffer and hold-out that is a query on it.

Who else gave the same example is known to the records' table alone (`daemon.state.records`), which hands such examples
over to the other subject first. Works inside the caller's transaction.
"""

import sqlite3

import msgspec


class Forgotten(msgspec.Struct):
    """What left the journal."""

    examples: list[int] = []
    """Rows that are gone."""
    hashes: list[str] = []
    """Their content hashes: what was cached of them is named by it."""
    claimed_by: list[str] = []
    """Runs at work that have them in their experience."""
    learned_in: list[tuple[str, int]] = []
    """(model, update) of every update that learned from one of them, oldest first."""
    files: list[str] = []
    """Dropped files that they came from."""


def forget(connection: sqlite3.Connection, subject: str) -> Forgotten:
    """Delete every example of a subject, whatever its state; says which runs and updates had them."""
    rows = connection.execute(
        "SELECT id, state, run_id, model, update_number, origin_file, hash FROM example WHERE subject = ?", (subject,)
    ).fetchall()
    connection.execute(
        """
        UPDATE intake SET (distinct_examples, heldout) = (
          SELECT intake.distinct_examples - count(*), intake.heldout - coalesce(sum(split = 'heldout'), 0) FROM example
          WHERE example.model = intake.model AND subject = ? AND split <> 'eval')
        """,
        (subject,),
    )
    connection.execute("DELETE FROM example WHERE subject = ?", (subject,))
    return Forgotten(
        examples=sorted(row[0] for row in rows),
        hashes=sorted({row[6] for row in rows}),
        claimed_by=sorted({row[2] for row in rows if row[1] == "claimed"}),
        learned_in=sorted({(row[3], row[4]) for row in rows if row[4] is not None}),
        files=sorted({row[5] for row in rows}),
    )
