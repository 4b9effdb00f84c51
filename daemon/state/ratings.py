"""Float feedback as it is stored: what a subject has rated before, and ratings that became a pair."""

from collections.abc import Collection

import msgspec

from daemon.state.database import Connection


class Past(msgspec.Struct, frozen=True):
    """One stored float record."""

    id: str
    body: bytes
    is_free: bool
    """It taught nothing yet, and nothing stands against it: another rating may be compared with it."""


def past(connection: Connection, model: str, subjects: Collection[str], limit: int) -> dict[str, list[Past]]:
    """Subject -> its newest `limit` float records that were not withdrawn, oldest first."""
    rows = connection.execute(
        "SELECT subject, id, body, is_free FROM ("
        " SELECT subject, id, body, state = 'stored' AND reason = '' AND code = '' AS is_free, rowid AS place,"
        " row_number() OVER (PARTITION BY subject ORDER BY rowid DESC) AS age FROM record"
        " WHERE subject IN (SELECT value FROM json_each(?)) AND model = ? AND kind = 'float' AND state <> 'retracted')"
        " WHERE age <= ? ORDER BY place",
        (msgspec.json.encode(sorted(subjects)).decode(), model, limit),
    )
    found: dict[str, list[Past]] = {}
    for subject, identity, body, is_free in rows:
        found.setdefault(subject, []).append(Past(identity, body, bool(is_free)))
    return found


def pair(connection: Connection, model: str, record_id: str, example_id: int) -> None:
    """The older record of a pair stands behind its example, too; inside the caller's transaction."""
    connection.execute(
        "UPDATE record SET state = 'journal', example_id = ? WHERE model = ? AND id = ? AND state = 'stored'",
        (example_id, model, record_id),
    )


def part(connection: Connection, example_id: int) -> None:
    """One rating of a pair was withdrawn: the other one is free again; inside the caller's transaction."""
    connection.execute(
        "UPDATE record SET state = 'stored', example_id = NULL WHERE example_id = ? AND kind = 'float'"
        " AND state = 'journal'",
        (example_id,),
    )
