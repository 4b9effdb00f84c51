"""Which stored examples and waiting records share a band with a text (see `daemon.trust.likeness`)."""

from collections.abc import Iterable

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


def note(connection: Connection, keys: Iterable[int], example_id: int) -> None:
    """Find an example by its bands from now on, inside the caller's transaction."""
    connection.executemany("INSERT OR IGNORE INTO example_band VALUES (?, ?)", ((key, example_id) for key in keys))


def stored(connection: Connection, keys: Iterable[int]) -> list[Stored]:
    """Examples that share a band and still count, newest first."""
    found = connection.execute(
        "SELECT id, split, body FROM example WHERE id IN (SELECT example_id FROM example_band"
        " WHERE band IN (SELECT value FROM json_each(?)) ORDER BY example_id DESC LIMIT ?)"
        " AND state NOT IN ('retracted', 'rejected') ORDER BY id DESC",
        (msgspec.json.encode(list(keys)).decode(), COMPARED_MAX),
    )
    return [Stored(identity, split, parse(body)) for identity, split, body in found]


def wait(connection: Connection, keys: Iterable[int], model: str, record_id: str) -> None:
    """Find a record in probation by its bands from now on, inside the caller's transaction."""
    connection.executemany(
        "INSERT OR IGNORE INTO waiting_band VALUES (?, ?, ?)", ((key, model, record_id) for key in keys)
    )


def waiting(connection: Connection, keys: Iterable[int], model: str) -> list[Waiting]:
    """Records in probation that share a band, the oldest ids first (UUIDv7 and ULID grow with time)."""
    found = connection.execute(
        "SELECT id, subject, ingested_at, body FROM record WHERE model = ?1 AND state = 'held' AND code = 'probation'"
        " AND id IN (SELECT DISTINCT record_id FROM waiting_band"
        " WHERE model = ?1 AND band IN (SELECT value FROM json_each(?2)) ORDER BY record_id LIMIT ?3)",
        (model, msgspec.json.encode(list(keys)).decode(), SUPPORTERS_MAX),
    )
    return [Waiting(*row) for row in found]


def forget_orphans(connection: Connection) -> None:
    """Drop the bands of what is gone, inside the caller's transaction: after an erasure."""
    connection.execute("DELETE FROM example_band WHERE example_id NOT IN (SELECT id FROM example)")
    connection.execute(
        "DELETE FROM waiting_band WHERE NOT EXISTS (SELECT 1 FROM record WHERE record.model = waiting_band.model"
        " AND record.id = record_id AND state = 'held' AND code = 'probation')"
    )
