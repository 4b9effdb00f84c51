"""What is known of dropped files: one row per path, so that a file is read once and a grown one from where it ended."""

import msgspec

from daemon.state.database import Connection


class Signature(msgspec.Struct, frozen=True):
    """What `stat` says about a file's content: unchanged signature, unchanged content."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A dropped file that waits to be read: what the watcher hands to ingest."""

    path: str
    """Below the library directory, printable: see `daemon.watch.printable`. The key of its row."""
    relative: str
    """The real name below the library directory, undecodable bytes as surrogates (`os.fsdecode`)."""
    signature: Signature
    problem: str = ""
    """Code of what forbids to open it at all (`not_a_file`, `never_stable`); empty for a file to be read."""


class FileRow(msgspec.Struct, frozen=True, kw_only=True):
    """What has been taken in of one file."""

    path: str
    signature: Signature
    head_sha256: str = ""
    """Of the first min(4096, offset) bytes: tells a rotated feedback file from a grown one."""
    sha256: str = ""
    """Of the whole (content files)."""
    offset: int = 0
    """Bytes of complete lines that are in the journal (feedback files)."""
    tail_sha256: str = ""
    """Of the min(4096, offset) bytes before `offset`: differs after a truncation that was written over."""
    lines: int = 0
    state: str = "read"
    """`read`, `partial` (more lines wait), `refused` (to be moved to the quarantine), `quarantined` or
    `rotated` (no longer at its path)."""


_COLUMNS = "path, dev, ino, size, mtime_ns, ctime_ns, head_sha256, sha256, offset, tail_sha256, lines, state"


def _row(values: tuple[object, ...]) -> FileRow:
    path, dev, ino, size, mtime_ns, ctime_ns, *rest = values
    signature = Signature(*(int(str(each)) for each in (dev, ino, size, mtime_ns, ctime_ns)))
    names = ("head_sha256", "sha256", "offset", "tail_sha256", "lines", "state")
    return msgspec.convert({"path": path, "signature": signature, **dict(zip(names, rest, strict=True))}, FileRow)


def known(connection: Connection, path: str) -> Signature | None:
    """The signature under which a path was read or refused; None when there is everything still to do.

    While lines of a feedback file wait, its size is what was read so far, so that it differs from the file's.
    """
    row = connection.execute(
        "SELECT dev, ino, size, mtime_ns, ctime_ns FROM file WHERE path = ? AND state <> 'refused'",
        (path,),
    ).fetchone()
    return None if row is None else Signature(*row)


def get(connection: Connection, path: str) -> FileRow | None:
    """The row of a path."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM file WHERE path = ?", (path,)).fetchone()
    return None if row is None else _row(row)


def by_inode(connection: Connection, dev: int, ino: int) -> list[FileRow]:
    """Rows of the same inode under whatever name, latest first: a rotated file is found again by it."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM file WHERE dev = ? AND ino = ? ORDER BY updated_at DESC", (dev, ino)
    )
    return [_row(row) for row in rows]


def put(connection: Connection, row: FileRow, now: float) -> None:
    """Write a row, inside the caller's transaction."""
    signature = row.signature
    connection.execute(
        f"INSERT OR REPLACE INTO file ({_COLUMNS}, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            row.path, signature.dev, signature.ino, signature.size, signature.mtime_ns, signature.ctime_ns,
            row.head_sha256, row.sha256, row.offset, row.tail_sha256, row.lines, row.state, now,
        ),
    )  # fmt: skip


def set_aside(connection: Connection, path: str, now: float) -> None:
    """Another file has taken the place of a feedback file: keep what was read of that one for when it turns up again.

    A rotated file is found by its inode under its new name; what has not turned up in a month never will.
    """
    connection.execute(
        "UPDATE OR REPLACE file SET path = '//' || dev || ':' || ino, state = 'rotated', updated_at = ? WHERE path = ?",
        (now, path),
    )
    connection.execute("DELETE FROM file WHERE state = 'rotated' AND updated_at < ?", (now - 30 * 86400,))


def forget(connection: Connection, path: str) -> None:
    """Drop a row: the file is gone from there, or shall be read again."""
    connection.execute("DELETE FROM file WHERE path = ?", (path,))
