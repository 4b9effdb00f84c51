"""Which stored examples and waiting records share a band with a text (see `daemon.trust.likeness`).

Asked for many texts at once: a statement for each of them would cost more than the comparing.
"""

from collections.abc import Collection, Iterable

import msgspec

from buffers.example import Example, parse
from daemon.state.database import Connection

COMPARED_MAX = 32
"""Of more candidates the newest are compared."""
SUPPORTERS_MAX = 12
"""Of records in probation the oldest: each is another subject's, and more are never asked for."""


class Stored(msgspec.Struct, frozen=True):
    """An example of the journal that may be alike."""

    id: int
    split: str
    example: Example


class Waiting(msgspec.Struct, frozen=True):
    """A record in probation that may be alike."""

    id: str
    subject: str
    ingested_at: float
    body: bytes


def note(connection: Connection, rows: Iterable[tuple[int, int]]) -> None:
    """Find examples by their bands from now on, inside the caller's transaction: rows are (band, example)."""
    connection.executemany("INSERT OR IGNORE INTO example_band VALUES (?, ?)", rows)


def near(connection: Connection, keys: Collection[int]) -> dict[int, list[int]]:
    """`{band: examples}`, the newest `COMPARED_MAX` of each band, newest first; every key is in it."""
    found = connection.execute(
        "SELECT value, (SELECT group_concat(example_id) FROM (SELECT example_id FROM example_band WHERE band = value"
        " ORDER BY example_id DESC LIMIT ?)) FROM json_each(?)",
        (COMPARED_MAX, _json(keys)),
    )
    return {band: [int(each) for each in ids.split(",")] if ids else [] for band, ids in found}


def stored(connection: Connection, ids: Collection[int]) -> list[Stored]:
    """Those of the examples that still count."""
    found = connection.execute(
        "SELECT id, split, body FROM example WHERE id IN (SELECT value FROM json_each(?))"
        " AND state NOT IN ('retracted', 'rejected')",
        (_json(ids),),
    )
    return [Stored(identity, split, parse(body)) for identity, split, body in found]


def wait(connection: Connection, model: str, rows: Iterable[tuple[int, str]]) -> None:
    """Find records in probation by their bands from now on, inside the caller's transaction: rows are (band, id)."""
    connection.executemany(
        "INSERT OR IGNORE INTO waiting_band VALUES (?, ?, ?)", ((band, model, identity) for band, identity in rows)
    )


def near_waiting(connection: Connection, model: str, keys: Collection[int]) -> dict[int, list[str]]:
    """`{band: records}`, the `SUPPORTERS_MAX` oldest ids of each band (UUIDv7 and ULID grow with time)."""
    found = connection.execute(
        "SELECT value, (SELECT group_concat(record_id) FROM (SELECT record_id FROM waiting_band WHERE band = value"
        " AND model = ? ORDER BY record_id LIMIT ?)) FROM json_each(?)",
        (model, SUPPORTERS_MAX, _json(keys)),
    )
    return {band: ids.split(",") if ids else [] for band, ids in found}


def waiting(connection: Connection, model: str, ids: Collection[str]) -> list[Waiting]:
    """Those of the records that still are in probation."""
    found = connection.execute(
        "SELECT id, subject, ingested_at, body FROM record WHERE model = ? AND state = 'held' AND code = 'probation'"
        " AND id IN (SELECT value FROM json_each(?))",
        (model, _json(ids)),
    )
    return [Waiting(*row) for row in found]


def _json(values: Collection[int] | Collection[str]) -> str:
    return msgspec.json.encode(list(values)).decode()


def forget_orphans(connection: Connection) -> None:
    """Drop the bands of what is gone, inside the caller's transaction: after an erasure."""
    connection.execute("DELETE FROM example_band WHERE example_id NOT IN (SELECT id FROM example)")
    connection.execute(
        "DELETE FROM waiting_band WHERE NOT EXISTS (SELECT 1 FROM record WHERE record.model = waiting_band.model"
        " AND record.id = record_id AND state = 'held' AND code = 'probation')"
    )
