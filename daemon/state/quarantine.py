"""What was refused and why: one row per bad file or bad line, with everything that its owner needs to mend it."""

import msgspec

from daemon.state.database import Connection

EXCERPT_BYTES = 64 * 1024
LINES_MAX = 1000
"""Rows per file: a file of a million bad lines must not fill the database; the rest is only counted."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """One reason, as it is written to the database and to `.reason.json`."""

    path: str
    line: int | None = None
    """1-based; None: the whole file."""
    byte_offset: int | None = None
    code: str
    stage: str
    """`watch`, `place`, `read`, `parse` or `trust`."""
    message: str
    sha256: str = ""
    retryable: bool = False
    """Whether a change of the configuration, rather than of the file, may help."""


class QuarantineRow(msgspec.Struct, frozen=True, kw_only=True):
    """A refusal with its history."""

    id: int
    path: str
    line: int | None
    byte_offset: int | None
    code: str
    stage: str
    message: str
    sha256: str
    stored: str | None
    excerpt: bytes | None
    retryable: bool
    attempts: int
    first_seen: float


_COLUMNS = "id, path, line, byte_offset, code, stage, message, sha256, stored, excerpt, retryable, attempts, first_seen"


def add(
    connection: Connection, refusal: Refusal, now: float, *, stored: str | None = None, excerpt: bytes | None = None
) -> int:
    """Write a refusal, inside the caller's transaction; the same one again only counts. Returns its id."""
    same = connection.execute(
        "SELECT id FROM quarantine WHERE path = ? AND line IS ? AND code = ? AND sha256 = ?",
        (refusal.path, refusal.line, refusal.code, refusal.sha256),
    ).fetchone()
    if same is not None:
        connection.execute("UPDATE quarantine SET attempts = attempts + 1, stored = ? WHERE id = ?", (stored, same[0]))
        return int(same[0])
    cursor = connection.execute(
        "INSERT INTO quarantine (path, line, byte_offset, code, stage, message, sha256, stored, excerpt, retryable,"
        " first_seen) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            refusal.path, refusal.line, refusal.byte_offset, refusal.code, refusal.stage, refusal.message,
            refusal.sha256, stored, None if excerpt is None else excerpt[:EXCERPT_BYTES], refusal.retryable, now,
        ),
    )  # fmt: skip
    return int(cursor.lastrowid or 0)


def line_count(connection: Connection, path: str) -> int:
    """How many bad lines of one file are listed."""
    row = connection.execute("SELECT count(*) FROM quarantine WHERE path = ? AND line IS NOT NULL", (path,)).fetchone()
    return int(row[0])


def rows(connection: Connection, limit: int = 1000) -> list[QuarantineRow]:
    """The latest refusals, newest first."""
    found = connection.execute(f"SELECT {_COLUMNS} FROM quarantine ORDER BY id DESC LIMIT ?", (limit,))
    return [_row(values) for values in found]


def get(connection: Connection, identity: int) -> QuarantineRow | None:
    """One refusal."""
    values = connection.execute(f"SELECT {_COLUMNS} FROM quarantine WHERE id = ?", (identity,)).fetchone()
    return None if values is None else _row(values)


def remove(connection: Connection, identity: int) -> None:
    """Forget a refusal, inside the caller's transaction."""
    connection.execute("DELETE FROM quarantine WHERE id = ?", (identity,))


def remove_of(connection: Connection, path: str) -> int:
    """Forget every refusal of a path: it has been read well, or shall be tried again. Returns how many."""
    return connection.execute("DELETE FROM quarantine WHERE path = ? AND line IS NULL", (path,)).rowcount


def _row(values: tuple[object, ...]) -> QuarantineRow:
    fields = dict(zip(QuarantineRow.__struct_fields__, values, strict=True))
    return msgspec.convert({**fields, "retryable": bool(fields["retryable"])}, QuarantineRow)
