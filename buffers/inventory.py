"""What is in a replay buffer, for people and for export."""

import json
import sqlite3
from collections.abc import Iterator

import msgspec

from buffers.example import Example, parse
from buffers.policy import Buffer
from buffers.replay_buffer import members


class Age(msgspec.Struct, frozen=True, kw_only=True):
    """The share of one past update in the buffer."""

    update: int
    learned: int
    """Training examples of that update."""
    held: int
    """How many of them the buffer still holds."""
    tokens: int
    """Of those that it holds, as the trainer counted them."""
    bytes: int
    """Of those that it holds."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """One example of the buffer and where it came from."""

    update: int
    file: str
    line: int
    example: Example


def composition(connection: sqlite3.Connection, model: str, buffer: Buffer) -> list[Age]:
    """The buffer by update, oldest first."""
    learned = connection.execute(
        "SELECT update_number, count(*) FROM example WHERE model = ? AND split = 'train' AND state = 'consumed'"
        " GROUP BY 1 ORDER BY 1",
        (model,),
    )
    kept = connection.execute(
        "SELECT update_number, count(*), sum(coalesce(tokens, length(body) / 4 + 1)), sum(length(body)) FROM example"
        " WHERE id IN (SELECT value FROM json_each(?)) GROUP BY 1",
        (json.dumps(members(connection, model, buffer)),),
    )
    held = {int(update): numbers for update, *numbers in kept}
    return [
        Age(update=update, learned=learned, held=number, tokens=tokens, bytes=size)
        for update, learned in learned
        for number, tokens, size in [held.get(update, (0, 0, 0))]
    ]


def held(connection: sqlite3.Connection, model: str, buffer: Buffer) -> Iterator[Held]:
    """The examples of the buffer, in the order in which they came in."""
    for identity in sorted(members(connection, model, buffer)):
        update, file, line, body = connection.execute(
            "SELECT update_number, origin_file, origin_line, body FROM example WHERE id = ?", (identity,)
        ).fetchone()
        yield Held(update=update, file=file, line=line, example=parse(body))
