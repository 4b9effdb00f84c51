"""Feedback records by the producer's id: the first body wins, and each knows what became of it in the journal."""

from collections.abc import Iterable

import msgspec

from daemon.state import ratings
from daemon.state.database import Connection


class RecordRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One stored record."""

    model: str
    id: str
    kind: str
    source: str
    subject: str
    body_sha256: str
    body: bytes
    state: str
    """`journal` (trained or tested), `stored` (never trained), `held` (for review), `rejected` or `retracted`."""
    reason: str = ""
    example_id: int | None = None
    pair_id: int | None = None
    code: str = ""
    """Why it is held: `probation`, `drift`, `blocked`, `subject_cap`, `free_text`, `consent`,
    `association`; or `alike`."""
    consent_until: float | None = None
    """Seconds since the epoch; None: for ever, or no consent was asked for."""


_COLUMNS = (
    "model, id, kind, source, subject, body_sha256, body, state, reason, example_id, pair_id, code, consent_until"
)


def known_bodies(connection: Connection, model: str, ids: Iterable[str]) -> dict[str, str]:
    """`{id: body_sha256}` of those ids that are stored already."""
    wanted = msgspec.json.encode(list(ids)).decode()
    rows = connection.execute(
        "SELECT id, body_sha256 FROM record WHERE model = ? AND id IN (SELECT value FROM json_each(?))", (model, wanted)
    )
    return dict(rows.fetchall())


def add(connection: Connection, rows: Iterable[RecordRow], now: float) -> None:
    """Store new records, inside the caller's transaction; raises `sqlite3.IntegrityError` for an id that is there."""
    connection.executemany(
        f"INSERT INTO record ({_COLUMNS}, ingested_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (
                row.model, row.id, row.kind, row.source, row.subject, row.body_sha256, row.body, row.state, row.reason,
                row.example_id, row.pair_id, row.code, row.consent_until, now,
            )
            for row in rows
        ),
    )  # fmt: skip


def get(connection: Connection, model: str, identity: str) -> RecordRow | None:
    """One record."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM record WHERE model = ? AND id = ?", (model, identity)).fetchone()
    return None if row is None else RecordRow(**dict(zip(RecordRow.__struct_fields__, row, strict=True)))


def learned_since(connection: Connection, subjects: Iterable[str], since: float) -> dict[str, int]:
    """How many records of each subject have gone into a journal since a time."""
    wanted = msgspec.json.encode(list(subjects)).decode()
    rows = connection.execute(
        "SELECT subject, count(*) FROM record WHERE subject IN (SELECT value FROM json_each(?)) AND ingested_at > ?"
        " AND state = 'journal' GROUP BY subject",
        (wanted, since),
    )
    return dict(rows.fetchall())


def held(
    connection: Connection, model: str | None = None, limit: int = 1000, code: str | None = None,
    subject: str | None = None,
) -> list[RecordRow]:  # fmt: skip
    """Records that wait for review, oldest first; of one model, for one reason, from one subject."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM record WHERE state = 'held' AND (?1 IS NULL OR model = ?1)"
        " AND (?3 IS NULL OR code = ?3) AND (?4 IS NULL OR subject = ?4) ORDER BY rowid LIMIT ?2",
        (model, limit, code, subject),
    )
    return [RecordRow(**dict(zip(RecordRow.__struct_fields__, row, strict=True))) for row in rows]


def suspects(connection: Connection, model: str | None = None, limit: int = 50) -> list[tuple[str, str, str, int]]:
    """(model, subject, why, how many): whose records were held or came to nothing.

    Those who may have planted a backdoor come first, then those with the most.
    """
    rows = connection.execute(
        "SELECT model, subject, group_concat(DISTINCT code), count(*) FROM record WHERE state IN ('held', 'stored')"
        " AND code <> '' AND (?1 IS NULL OR model = ?1) GROUP BY 1, 2"
        " ORDER BY sum(code = 'association') DESC, 4 DESC, 2 LIMIT ?2",
        (model, limit),
    )
    return [(str(owner), str(subject), str(why), int(number)) for owner, subject, why, number in rows]


def settle(connection: Connection, row: RecordRow, state: str, reason: str, ids: list[int]) -> None:
    """End a review, inside the caller's transaction: `journal` with the rows of its examples, or `rejected`."""
    pair = (*ids, None, None)
    connection.execute(
        "UPDATE record SET state = ?, reason = ?, example_id = ?, pair_id = ? WHERE model = ? AND id = ?",
        (state, reason, pair[0], pair[1], row.model, row.id),
    )


def retractions_of(connection: Connection, model: str, ids: Iterable[str]) -> dict[str, str]:
    """`{withdrawn id: subject}` of retractions that arrived before the records that they withdraw."""
    wanted = msgspec.json.encode(list(ids)).decode()
    rows = connection.execute(
        "SELECT reason, subject FROM record WHERE kind = 'retraction' AND model = ?"
        " AND reason IN (SELECT value FROM json_each(?))",
        (model, wanted),
    )
    return dict(rows.fetchall())


def expired(connection: Connection, now: float, limit: int = 1000) -> list[RecordRow]:
    """Records that may be learned from no longer, because the consent to it has run out."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM record WHERE consent_until <= ? AND state IN ('journal', 'held')"
        " ORDER BY consent_until LIMIT ?",
        (now, limit),
    )
    return [RecordRow(**dict(zip(RecordRow.__struct_fields__, row, strict=True))) for row in rows]


def retract(connection: Connection, row: RecordRow, reason: str) -> int:
    """Withdraw a record, inside the caller's transaction; returns how many examples nobody stands behind any more.

    An example that another record gave as well stays: it is only attributed to that one from now on.
    """
    connection.execute(
        "UPDATE record SET state = 'retracted', reason = ? WHERE model = ? AND id = ?", (reason, row.model, row.id)
    )
    if row.kind == "float" and row.example_id is not None:
        ratings.part(connection, row.example_id)
    return sum(_let_go(connection, each) for each in (row.example_id, row.pair_id) if each is not None)


def _let_go(connection: Connection, example_id: int) -> int:
    other = connection.execute(
        "SELECT id, subject, source FROM record WHERE (example_id = ? OR pair_id = ?) AND state = 'journal'"
        " ORDER BY rowid LIMIT 1",
        (example_id, example_id),
    ).fetchone()
    if other is not None:
        connection.execute(
            "UPDATE example SET record_id = ?, subject = ?, source = ? WHERE id = ?", (*other, example_id)
        )
        return 0
    return connection.execute(
        "UPDATE example SET state = 'retracted' WHERE id = ? AND state <> 'retracted'", (example_id,)
    ).rowcount


def counts(connection: Connection, model: str) -> dict[str, int]:
    """`{"boolean/journal": 3, ...}`: how many records there are, by kind and state."""
    rows = connection.execute(
        "SELECT kind || '/' || state, count(*) FROM record WHERE model = ? GROUP BY 1 ORDER BY 1", (model,)
    )
    return {str(key): int(number) for key, number in rows}


def latest_row(connection: Connection) -> int:
    """The place up to which records are stored; those that come are after it."""
    return int(connection.execute("SELECT coalesce(max(rowid), 0) FROM record").fetchone()[0])


def complaints(connection: Connection, model: str, version: int, after: int) -> tuple[int, int]:
    """Of the believed records after a row that say what they think of this version's answers: all, and the bad ones.

    Bad are a rating `false` and a correction. Held records do not count: the caps on subjects hold here, too.
    """
    names = (f"{model}@{version:04d}", f"{model}-{version:04d}")
    row = connection.execute(
        "SELECT count(*), coalesce(sum(kind = 'demonstration' OR json_extract(text, '$.value') = 0), 0) FROM ("
        " SELECT kind, CAST(body AS TEXT) AS text FROM record WHERE rowid > ? AND model = ?"
        " AND kind IN ('boolean', 'demonstration') AND state = 'journal')"
        " WHERE json_extract(text, '$.inference.adapter') IN (?, ?)",
        (after, model, *names),
    ).fetchone()
    return int(row[0]), int(row[1])
