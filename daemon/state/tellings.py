"""How far the audit log has been told of, and which numbers were: settings, so that a restart repeats nothing."""

from collections.abc import Iterable
from typing import Any

import msgspec

from daemon.state.database import Connection, set_setting, setting

ROWS = 200
Row = tuple[int, float, str, str, dict[str, Any]]


def begin(connection: Connection) -> int:
    """The audit row up to which everything was told. Without one, the newest: what is past then is no news."""
    kept = setting(connection, "told/audit")
    if kept:
        return int(kept)
    return int(connection.execute("SELECT coalesce(max(id), 0) FROM audit").fetchone()[0])


def untold(connection: Connection, after: int, events: Iterable[str]) -> tuple[int, list[Row]]:
    """Rows (id, at, event, subject, detail) of these events behind `after`, and the id up to which that looked."""
    last = int(connection.execute("SELECT coalesce(max(id), 0) FROM audit").fetchone()[0])
    if last == after:
        return last, []
    wanted = msgspec.json.encode(list(events)).decode()
    rows = connection.execute(
        "SELECT id, at, event, subject, detail FROM audit WHERE id > ? AND id <= ?"
        " AND event IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?",
        (after, last, wanted, ROWS),
    ).fetchall()
    found = [(int(i), float(at), str(event), str(of), msgspec.json.decode(text)) for i, at, event, of, text in rows]
    return (found[-1][0] if len(found) == ROWS else last), found


def remember(connection: Connection, up_to: int, marks: dict[str, int]) -> None:
    """Up to which audit row everything was told, and which numbers; in the caller's transaction."""
    set_setting(connection, "told/audit", str(up_to))
    set_setting(connection, "told/marks", msgspec.json.encode(marks).decode())


def marks(connection: Connection) -> dict[str, int]:
    """The numbers that were told of last."""
    return msgspec.json.decode(setting(connection, "told/marks") or "{}", type=dict[str, int])


def held_counts(connection: Connection) -> dict[str, int]:
    """Feedback records that wait for review, by model."""
    rows = connection.execute("SELECT model, count(*) FROM record WHERE state = 'held' GROUP BY 1")
    return {str(model): int(number) for model, number in rows}
