"""Content files that have an id: which version of which document is the present one, and what it withdraws."""

from collections.abc import Iterable

import msgspec

from daemon.state.database import Connection


def replace(
    connection: Connection, model: str, path: str, identity: str | None, sha256: str, kept: Iterable[int],
    replaced: Iterable[str], now: float,
) -> int:  # fmt: skip
    """Make a file the present version of its document, inside the caller's transaction.

    Examples of the earlier versions, and of the documents that it supersedes, are withdrawn unless they are among
    `kept` (rows of the journal). Returns how many.
    """
    ids = msgspec.json.encode(list(kept)).decode()
    revive(connection, ids)
    paths = [
        row[0] for name in replaced
        for row in connection.execute("SELECT path FROM document WHERE model = ? AND id = ?", (model, name))
    ]  # fmt: skip
    withdrawn = sum(_withdraw(connection, model, each, ids) for each in set(paths))
    for name in replaced:
        connection.execute("DELETE FROM document WHERE model = ? AND id = ?", (model, name))
    if identity is not None:
        connection.execute("INSERT INTO document VALUES (?, ?, ?, ?, ?)", (model, identity, path, sha256, now))
    return withdrawn


def revive(connection: Connection, ids: str) -> None:
    """What a writer drops again counts again, whatever an earlier version had withdrawn; `ids` is a JSON array.

    Only content: what a subject has withdrawn stays withdrawn.
    """
    connection.execute(
        "UPDATE example SET state = CASE WHEN update_number IS NULL THEN 'pending' ELSE 'consumed' END"
        " WHERE id IN (SELECT value FROM json_each(?)) AND state = 'retracted' AND subject IS NULL",
        (ids,),
    )


def _withdraw(connection: Connection, model: str, path: str, kept: str) -> int:
    return connection.execute(
        "UPDATE example SET state = 'retracted' WHERE model = ? AND origin_file = ? AND subject IS NULL"
        " AND state <> 'retracted' AND id NOT IN (SELECT value FROM json_each(?))",
        (model, path, kept),
    ).rowcount
