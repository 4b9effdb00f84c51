"""What the trust in a subject or a source goes by: since when it is known, and what it has said before."""

from collections.abc import Iterable

import msgspec

from buffers.example import Example, parse
from daemon.state.database import Connection

SAYINGS_MAX = 1000
"""The newest so many learned examples of a source stand for its past; reading them takes some 20 ms."""


def known_since(connection: Connection, subjects: Iterable[str]) -> dict[str, float]:
    """When the first record of each subject came in; those without one are missing."""
    wanted = msgspec.json.encode(list(subjects)).decode()
    rows = connection.execute(
        "SELECT subject, min(ingested_at) FROM record WHERE subject IN (SELECT value FROM json_each(?)) GROUP BY 1",
        (wanted,),
    )
    return dict(rows.fetchall())


def sayings(connection: Connection, model: str, source: str, since: float, until: float) -> list[tuple[Example, str]]:
    """What a source has said within a time and counts: (example, subject), the newest `SAYINGS_MAX`."""
    found = connection.execute(
        # `source <> ''` lets SQLite use the index of feedback alone; rows of one batch have the same time
        "SELECT body, subject FROM example WHERE model = ? AND source = ? AND source <> '' AND ingested_at > ?"
        " AND ingested_at <= ? AND state NOT IN ('retracted', 'rejected') ORDER BY ingested_at DESC, id DESC LIMIT ?",
        (model, source, since, until, SAYINGS_MAX),
    )
    return [(parse(body), subject or "") for body, subject in found]
