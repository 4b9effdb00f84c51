"""What waits to be learned once more before an update takes it: what players teach, and what writers have said."""

from collections.abc import Collection, Iterable, Sequence

import msgspec

from buffers.example import Example, parse
from daemon.state.database import Connection

LOOKED_AT_MAX = 20_000
"""All that waits and the newest of what was learned, together: a second or so."""
WRITTEN_MAX = 20_000
"""Examples of writers and staff: what was written before them is as if nobody had."""
HELD_MAX = 5_000
"""The newest of what waits for review already."""
_ACCEPTED = (
    "SELECT example_id FROM record WHERE state = 'journal' AND reason LIKE 'accepted by %' AND example_id IS NOT NULL"
)
_PLAYERS = f"source <> '' AND source NOT IN (SELECT value FROM json_each(?)) AND id NOT IN ({_ACCEPTED})"


def taught(connection: Connection, model: str, trusted: Sequence[str]) -> list[tuple[int, Example, bool]]:
    """(row, example, whether it waits) of what counts, came from players and was not accepted by a person."""
    rows = connection.execute(
        "SELECT id, body, state = 'pending' FROM example WHERE model = ? AND split <> 'eval'"
        f" AND state IN ('pending', 'claimed', 'consumed') AND {_PLAYERS}"
        " ORDER BY state = 'pending' DESC, id DESC LIMIT ?",
        (model, _json(trusted), LOOKED_AT_MAX),
    )
    return [(int(identity), parse(body), bool(waits)) for identity, body, waits in rows]


def held(connection: Connection, model: str) -> list[tuple[int, bytes]]:
    """(place, record) of what waits because its subject is new or has said enough: its kind may be worse than that."""
    rows = connection.execute(
        "SELECT rowid, body FROM record WHERE model = ? AND state = 'held' AND code IN ('probation', 'subject_cap')"
        " ORDER BY rowid DESC LIMIT ?",
        (model, HELD_MAX),
    )
    return [(int(place), body) for place, body in rows]


def rename(connection: Connection, reasons: Iterable[tuple[int, str]], code: str) -> None:
    """Records that wait for review wait for another reason, inside the caller's transaction."""
    connection.executemany(
        "UPDATE record SET code = ?, reason = ? WHERE rowid = ?", ((code, reason, place) for place, reason in reasons)
    )


def holding(connection: Connection, model: str, trusted: Sequence[str], word: str) -> set[int]:
    """Rows in which somebody who is trusted has used these letters: writers, staff, or what a person accepted.

    Of the newest `WRITTEN_MAX`: some 150 ms.
    """
    rows = connection.execute(
        "SELECT id FROM (SELECT id, body FROM example WHERE model = ? AND state NOT IN ('retracted', 'rejected')"
        f" AND NOT ({_PLAYERS}) ORDER BY id DESC LIMIT ?) WHERE instr(lower(CAST(body AS TEXT)), ?) > 0",
        (model, _json(trusted), WRITTEN_MAX, word),
    )
    return {int(row[0]) for row in rows}


def hold(connection: Connection, reasons: Iterable[tuple[int, str]], code: str) -> int:
    """Take examples out of the journal and their records into the review queue; how many records.

    Inside the caller's transaction.
    """
    held = 0
    for example_id, reason in reasons:
        connection.execute("UPDATE example SET state = 'retracted' WHERE id = ? AND state = 'pending'", (example_id,))
        held += connection.execute(
            "UPDATE record SET state = 'held', code = ?, reason = ? WHERE state = 'journal'"
            " AND (example_id = ? OR pair_id = ?)",
            (code, reason, example_id, example_id),
        ).rowcount
    return held


def restore(connection: Connection, example_ids: Collection[int]) -> None:
    """A person accepted what had been taken out: it waits again; inside the caller's transaction."""
    connection.execute(
        "UPDATE example SET state = 'pending', run_id = NULL WHERE state = 'retracted'"
        " AND id IN (SELECT value FROM json_each(?))",
        (_json(sorted(example_ids)),),
    )


def _json(values: Sequence[object]) -> str:
    return msgspec.json.encode(values).decode()
