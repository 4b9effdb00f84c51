"""The audit log: append-only, each row's hash covers the row before it, so that a change in the past shows."""

import hashlib
import time
from typing import Any

import msgspec

from daemon.state.database import Connection


class Entry(msgspec.Struct, frozen=True):
    """One row: who did what to which run, version, file or subject."""

    id: int
    at: float
    actor: str
    event: str
    subject: str
    detail: dict[str, Any]
    hash: str


def write(
    connection: Connection, event: str, subject: str, detail: dict[str, Any] | None = None, actor: str = "eternad"
) -> None:
    """Append a row inside the caller's transaction."""
    previous = connection.execute("SELECT hash FROM audit ORDER BY id DESC LIMIT 1").fetchone()
    at, text = time.time(), msgspec.json.encode(detail or {}, order="sorted").decode()
    digest = _hash(previous[0] if previous else "", at, actor, event, subject, text)
    connection.execute(
        "INSERT INTO audit (at, actor, event, subject, detail, hash) VALUES (?, ?, ?, ?, ?, ?)",
        (at, actor, event, subject, text, digest),
    )


def entries(connection: Connection, limit: int = 100, after: int = 0) -> list[Entry]:
    """The latest `limit` rows with an id above `after`, oldest first."""
    rows = connection.execute(
        "SELECT * FROM (SELECT id, at, actor, event, subject, detail, hash FROM audit WHERE id > ?"
        " ORDER BY id DESC LIMIT ?) ORDER BY id",
        (after, limit),
    )
    return [
        Entry(identity, at, actor, event, subject, msgspec.json.decode(text), digest)
        for identity, at, actor, event, subject, text, digest in rows
    ]


def broken_at(connection: Connection) -> int | None:
    """The id of the first row whose hash is wrong, or None when the chain holds."""
    previous = ""
    for identity, at, actor, event, subject, text, digest in connection.execute(
        "SELECT id, at, actor, event, subject, detail, hash FROM audit ORDER BY id"
    ):
        if _hash(previous, at, actor, event, subject, text) != digest:
            return int(identity)
        previous = digest
    return None


def _hash(previous: str, at: float, actor: str, event: str, subject: str, text: str) -> str:
    return hashlib.sha256("\x1f".join((previous, repr(at), actor, event, subject, text)).encode()).hexdigest()
