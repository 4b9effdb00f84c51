"""Who is in a model's replay buffer."""

import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

from buffers.balanced import balanced
from buffers.policy import Buffer, Candidate, Past, Policy
from buffers.reservoir import reservoir
from buffers.ring import ring
from buffers.similarity import similarity
from buffers.surprise import surprise

POLICIES: dict[str, Policy] = {
    "reservoir": reservoir, "ring": ring, "balanced": balanced, "surprise": surprise, "similarity": similarity,
}  # fmt: skip


def members(connection: sqlite3.Connection, model: str, buffer: Buffer, run_id: str | None = None) -> list[int]:
    """Rows of the journal, the worthiest first, within every bound of `buffer`.

    The age for `ttl_seconds` is counted back from the newest example of run `run_id` (by default: of the model), never
    from the clock: an experience that is cut twice is the same twice.
    """
    past = Past(connection, model, _since(connection, model, buffer, run_id), run_id)
    return [candidate.id for candidate in admitted(POLICIES[buffer.policy](past, buffer), buffer)]


def admitted(ordered: Iterable[Candidate], buffer: Buffer) -> Iterator[Candidate]:
    """The first of `ordered` that fit, each once; of one subject no more than its cap.

    It ends with the first that does not fit, so that a smaller buffer is the start of a larger one; only an example
    that no empty buffer could hold is passed over.
    """
    most = max(int(buffer.subject_share * buffer.examples), 1)
    tokens, size = buffer.tokens or sys.maxsize, buffer.bytes or sys.maxsize
    seen: set[int] = set()
    places: Counter[str] = Counter()
    for each in ordered:
        if len(seen) == buffer.examples:
            return
        is_too_large = each.tokens > (buffer.tokens or sys.maxsize) or each.bytes > (buffer.bytes or sys.maxsize)
        if each.id in seen or is_too_large or (each.subject is not None and places[each.subject] == most):
            continue
        tokens, size = tokens - each.tokens, size - each.bytes
        if tokens < 0 or size < 0:
            return
        seen.add(each.id)
        if each.subject is not None:
            places[each.subject] += 1
        yield each


def _since(connection: sqlite3.Connection, model: str, buffer: Buffer, run_id: str | None) -> float | None:
    if buffer.ttl_seconds is None:
        return None
    of_run = "" if run_id is None else " AND run_id = ?"
    newest = connection.execute(
        f"SELECT max(ingested_at) FROM example WHERE model = ?{of_run}", (model,) if run_id is None else (model, run_id)
    ).fetchone()[0]
    return None if newest is None else float(newest) - buffer.ttl_seconds
