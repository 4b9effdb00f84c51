"""Who is in a model's replay buffer."""

import sqlite3

from buffers.balanced import balanced
from buffers.policy import Buffer, Past, Policy
from buffers.reservoir import reservoir
from buffers.ring import ring
from buffers.surprise import surprise

POLICIES: dict[str, Policy] = {"reservoir": reservoir, "ring": ring, "balanced": balanced, "surprise": surprise}


def members(connection: sqlite3.Connection, model: str, buffer: Buffer, run_id: str | None = None) -> list[int]:
    """Rows of the journal, the worthiest first; at most `buffer.examples`, and of one subject no more than its cap.

    The age for `ttl_seconds` is counted back from the newest example of run `run_id` (by default: of the model), never
    from the clock: an experience that is cut twice is the same twice.
    """
    past = Past(connection, model, _since(connection, model, buffer, run_id))
    most = max(int(buffer.subject_share * buffer.examples), 1)
    admitted: dict[int, None] = {}
    places: dict[str, int] = {}
    for identity, subject in POLICIES[buffer.policy](past, buffer):
        if len(admitted) == buffer.examples:
            break
        if identity in admitted:
            continue
        if subject is not None:
            if places.get(subject, 0) == most:
                continue
            places[subject] = places.get(subject, 0) + 1
        admitted[identity] = None
    return list(admitted)


def _since(connection: sqlite3.Connection, model: str, buffer: Buffer, run_id: str | None) -> float | None:
    if buffer.ttl_seconds is None:
        return None
    of_run = "" if run_id is None else " AND run_id = ?"
    newest = connection.execute(
        f"SELECT max(ingested_at) FROM example WHERE model = ?{of_run}", (model,) if run_id is None else (model, run_id)
    ).fetchone()[0]
    return None if newest is None else float(newest) - buffer.ttl_seconds
