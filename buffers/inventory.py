"""What is in a replay buffer, for people and for export."""

import sqlite3
from collections.abc import Iterator

import msgspec

from buffers.example import Example, parse
from buffers.experience import buffer_ids


class Age(msgspec.Struct, frozen=True, kw_only=True):
    """The share of one past update in the buffer."""

    update: int
    learned: int
    """Training examples of that update."""
    held: int
    """How many of them the buffer still holds."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """One example of the buffer and where it came from."""

    update: int
    file: str
    line: int
    example: Example


def composition(connection: sqlite3.Connection, model: str, size: int) -> list[Age]:
    """The buffer by update, oldest first."""
    consumed = "FROM example WHERE model = ? AND split = 'train' AND state = 'consumed'"
    learned = connection.execute(f"SELECT update_number, count(*) {consumed} GROUP BY 1 ORDER BY 1", (model,))
    # the same rows as `experience.buffer_ids`, counted where they lie
    members = connection.execute(
        f"SELECT update_number, count(*) FROM (SELECT update_number {consumed} ORDER BY weight DESC LIMIT ?)"
        " GROUP BY 1",
        (model, size),
    )
    held = {int(update): int(number) for update, number in members}
    return [Age(update=update, learned=number, held=held.get(update, 0)) for update, number in learned]


def held(connection: sqlite3.Connection, model: str, size: int) -> Iterator[Held]:
    """The examples of the buffer, in the order in which they came in."""
    for identity in sorted(buffer_ids(connection, model, size)):
        update, file, line, body = connection.execute(
            "SELECT update_number, origin_file, origin_line, body FROM example WHERE id = ?", (identity,)
        ).fetchone()
        yield Held(update=update, file=file, line=line, example=parse(body))
