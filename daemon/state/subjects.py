"""Subjects that asked to be forgotten: only a hash of the pseudonym is kept, to know it when it comes again."""

import hashlib
from collections.abc import Iterable

import msgspec

from daemon.state.database import Connection


def fingerprint(subject: str) -> str:
    """SHA-256 (hex) of a subject's id: what tombstones, receipts and the audit log know of it."""
    return hashlib.sha256(subject.encode()).hexdigest()


def bury(connection: Connection, subject: str, now: float) -> None:
    """Refuse this subject from now on, inside the caller's transaction."""
    connection.execute("INSERT OR IGNORE INTO tombstone VALUES (?, ?)", (fingerprint(subject), now))


def buried(connection: Connection, subjects: Iterable[str]) -> set[str]:
    """Those of the subjects that were erased."""
    if connection.execute("SELECT 1 FROM tombstone LIMIT 1").fetchone() is None:
        return set()
    prints = {fingerprint(each): each for each in subjects}
    wanted = msgspec.json.encode(list(prints)).decode()
    found = connection.execute(
        "SELECT subject_sha256 FROM tombstone WHERE subject_sha256 IN (SELECT value FROM json_each(?))", (wanted,)
    )
    return {prints[row[0]] for row in found}


def hand_over(connection: Connection, subject: str) -> int:
    """Examples of a subject that another one gave as well become that one's; how many."""
    return connection.execute(
        """
        UPDATE example SET (record_id, subject, source) = (
          SELECT id, subject, source FROM record
          WHERE (example_id = example.id OR pair_id = example.id) AND state = 'journal' AND record.subject <> ?1
          ORDER BY rowid LIMIT 1)
        WHERE subject = ?1 AND EXISTS (
          SELECT 1 FROM record
          WHERE (example_id = example.id OR pair_id = example.id) AND state = 'journal' AND record.subject <> ?1)
        """,
        (subject,),
    ).rowcount


def forget_records(connection: Connection, subject: str) -> int:
    """Delete the records of a subject, and the bad lines that name it, inside the caller's transaction; how many."""
    records = connection.execute("DELETE FROM record WHERE subject = ?", (subject,)).rowcount
    name = subject.encode()
    return records + connection.execute("DELETE FROM quarantine WHERE instr(excerpt, ?) > 0", (name,)).rowcount


def versions_since(connection: Connection, model: str, update: int) -> list[int]:
    """Versions of a model that learned in an update or go on from one that did: that update's and all later ones."""
    rows = connection.execute(
        "SELECT version.number FROM version JOIN run ON run.id = version.run_id"
        " WHERE version.model = ? AND run.update_number >= ? ORDER BY 1",
        (model, update),
    )
    return [int(row[0]) for row in rows]


def scrub(connection: Connection) -> None:
    """Take what was deleted out of the WAL and of free pages, outside of any transaction.

    `secure_delete` has overwritten the pages; this folds the WAL in, and writes the file anew without free space.
    """
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
