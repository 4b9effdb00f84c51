"""Whose turn an example is: it waits, a run claims it, and the run's end decides what becomes of it.

Every function works inside the caller's transaction: an example is consumed in the one that ends its run, so that each
is learned by exactly one version that serves.
"""

import sqlite3

import msgspec


class Share(msgspec.Struct, frozen=True):
    """How much of one update a single subject may give."""

    of_one: float
    """At most this share of the new examples, at least one of them."""
    exempt: tuple[str, ...] = ()
    """Sources whose subjects are not counted; content has no subject."""


class Pending(msgspec.Struct):
    """What waits to be learned, for the schedule."""

    train: int
    heldout: int
    oldest_at: float | None  # seconds since the epoch
    newest_at: float | None


def pending(connection: sqlite3.Connection, model: str) -> Pending:
    """What waits to be learned for one model."""
    row = connection.execute(
        "SELECT sum(split = 'train'), sum(split = 'heldout'), min(ingested_at), max(ingested_at)"
        " FROM example WHERE model = ? AND state = 'pending' AND split <> 'eval'",
        (model,),
    ).fetchone()
    return Pending(train=row[0] or 0, heldout=row[1] or 0, oldest_at=row[2], newest_at=row[3])


def claim(connection: sqlite3.Connection, model: str, run_id: str, limit: int, share: Share | None = None) -> int:
    """Give the oldest `limit` pending training examples, and the held-out ones among them, to a run; how many.

    With a `share`, what one subject has given beyond it is passed over and waits for the next run.
    """
    exempt, places = _places(connection, model, limit, share)
    last = connection.execute(f"SELECT max(id) FROM ({_CLAIMABLE})", (exempt, model, places, limit)).fetchone()[0]
    if last is None:
        return 0
    found = connection.execute(
        f"UPDATE example SET state = 'claimed', run_id = ? WHERE id IN ({_CLAIMABLE})",
        (run_id, exempt, model, places, limit),
    ).rowcount
    whole = pending(connection, model).train == 0
    connection.execute(
        "UPDATE example SET state = 'claimed', run_id = ? WHERE model = ? AND state = 'pending' AND split = 'heldout'"
        + ("" if whole else f" AND id <= {int(last)}"),
        (run_id, model),
    )
    return found


_CLAIMABLE = """
    SELECT id FROM (
      SELECT id, subject IS NOT NULL AND source NOT IN (SELECT value FROM json_each(?)) AS is_capped,
        row_number() OVER (PARTITION BY subject ORDER BY id) AS place
      FROM example WHERE model = ? AND state = 'pending' AND split = 'train')
    WHERE NOT is_capped OR place <= ? ORDER BY id LIMIT ?"""


def allowed(connection: sqlite3.Connection, model: str, limit: int, share: Share) -> int:
    """How many pending training examples one run of at most `limit` could claim."""
    free, counts = _by_subject(connection, model, share)
    places = _fitting(free, counts, limit, share.of_one)
    return min(limit, free + sum(min(each, places) for each in counts))


def _places(connection: sqlite3.Connection, model: str, limit: int, share: Share | None) -> tuple[str, int]:
    """(exempt sources as JSON, how many examples one subject may give)."""
    if share is None:
        return "[]", limit
    exempt = msgspec.json.encode(share.exempt).decode()
    return exempt, _fitting(*_by_subject(connection, model, share), limit, share.of_one)


def _fitting(free: int, counts: list[int], limit: int, of_one: float) -> int:
    """The most places for each subject that are no more than the share of what is then claimed."""
    places = max(int(of_one * limit), 1)
    while True:
        claimed = min(limit, free + sum(min(each, places) for each in counts))
        fewer = max(min(int(of_one * claimed), places), 1)
        if fewer == places:
            return places
        places = fewer


def _by_subject(connection: sqlite3.Connection, model: str, share: Share) -> tuple[int, list[int]]:
    """Pending training examples that are not counted by subject, and the numbers of those that are."""
    rows = connection.execute(
        "SELECT CASE WHEN source NOT IN (SELECT value FROM json_each(?)) THEN subject END, count(*) FROM example"
        " WHERE model = ? AND state = 'pending' AND split = 'train' GROUP BY 1",
        (msgspec.json.encode(share.exempt).decode(), model),
    ).fetchall()
    return sum(row[1] for row in rows if row[0] is None), [row[1] for row in rows if row[0] is not None]


def consume(connection: sqlite3.Connection, run_id: str, update_number: int) -> int:
    """The run ended well: its examples count as learned in update `update_number`. Returns how many."""
    return connection.execute(
        "UPDATE example SET state = 'consumed', update_number = ? WHERE run_id = ? AND state = 'claimed'",
        (update_number, run_id),
    ).rowcount


def release(connection: sqlite3.Connection, run_id: str, *, attempts_max: int, failed: bool = True) -> int:
    """The run ended without a version: its examples wait again. Returns how many were set aside instead.

    A failed or rejected run counts as one failure of each of its examples; those that have failed `attempts_max` times
    become `rejected`: no longer tried, kept for `requeue`. A cancelled run (`failed=False`) counts nothing.
    """
    connection.execute(
        "UPDATE example SET failures = failures + ?,"
        " state = CASE WHEN failures + ? >= ? THEN 'rejected' ELSE 'pending' END"
        " WHERE run_id = ? AND state = 'claimed'",
        (int(failed), int(failed), attempts_max, run_id),
    )
    rejected = connection.execute(
        "SELECT count(*) FROM example WHERE run_id = ? AND state = 'rejected'", (run_id,)
    ).fetchone()[0]
    connection.execute("UPDATE example SET run_id = NULL WHERE run_id = ? AND state = 'pending'", (run_id,))
    return int(rejected)


def set_aside(connection: sqlite3.Connection, run_id: str) -> int:
    """The version of this run was rolled back: what it taught is no longer rehearsed. Returns how many."""
    return connection.execute(
        "UPDATE example SET state = 'rejected' WHERE run_id = ? AND state = 'consumed'", (run_id,)
    ).rowcount


def restore(connection: sqlite3.Connection, run_id: str) -> int:
    """The opposite of `set_aside`: the version of this run serves again. Returns how many."""
    return connection.execute(
        "UPDATE example SET state = 'consumed' WHERE run_id = ? AND state = 'rejected' AND update_number IS NOT NULL",
        (run_id,),
    ).rowcount


def requeue(connection: sqlite3.Connection, run_id: str) -> int:
    """An operator wants the examples of a rejected or rolled-back run to be tried again. Returns how many."""
    return connection.execute(
        "UPDATE example SET state = 'pending', run_id = NULL, update_number = NULL, failures = 0"
        " WHERE run_id = ? AND state = 'rejected'",
        (run_id,),
    ).rowcount
