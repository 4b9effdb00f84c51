"""Files that are named by a batch manifest and not taken in yet: each waits for all of its batch."""

from collections.abc import Iterable

import msgspec

from daemon.state.database import Connection


class Named(msgspec.Struct, frozen=True):
    """Which manifest names a file."""

    manifest: str
    """Real name below the library directory."""
    since: float


def name(connection: Connection, manifest: str, paths: Iterable[str], now: float) -> float:
    """Note that a manifest names these paths, and no others any more, inside the caller's transaction; since when."""
    row = connection.execute("SELECT min(since) FROM batch_file WHERE manifest = ?", (manifest,)).fetchone()
    since = now if row[0] is None else min(float(row[0]), now)
    forget(connection, manifest)
    connection.executemany(
        "INSERT OR REPLACE INTO batch_file VALUES (?, ?, ?)", ((path, manifest, since) for path in paths)
    )
    return since


def of(connection: Connection, path: str) -> Named | None:
    """The manifest that names a path, if one is waiting."""
    row = connection.execute("SELECT manifest, since FROM batch_file WHERE path = ?", (path,)).fetchone()
    return None if row is None else Named(str(row[0]), float(row[1]))


def forget(connection: Connection, manifest: str) -> None:
    """Nothing waits for this manifest any more, inside the caller's transaction."""
    connection.execute("DELETE FROM batch_file WHERE manifest = ?", (manifest,))
