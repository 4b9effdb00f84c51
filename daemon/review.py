"""The review queue: feedback that is not believed by itself waits for somebody who knows."""

import msgspec

from buffers import journal
from buffers.example import Origin
from daemon.config import Config
from daemon.ingest import feedback
from daemon.ingest.kinship import Kin
from daemon.ingest.ratings import Ratings
from daemon.state import audit, ratings, records
from daemon.state.database import Connection, transaction
from daemon.state.records import RecordRow

AT_ONCE_MAX = 10_000
"""One order decides about at most so many records; the next one about the rest."""


class Chosen(msgspec.Struct, frozen=True):
    """Which held records are meant."""

    why: str | None = None
    subject: str | None = None


class NotHeld(Exception):
    """There is no such record in the queue."""


def accept(connection: Connection, config: Config, model: str, identity: str, actor: str, now: float) -> int:
    """Learn from a held record; how many examples are new. Raises `NotHeld`."""
    row = _held(connection, model, identity)
    record = feedback.read(msgspec.json.decode(row.body), model)
    origin = Origin(file="", source=row.source, subject=row.subject, record_id=row.id)
    with transaction(connection):
        taught = Ratings(connection, config.metrics, model, [record]).taught(row.id, record)
        examples = taught.examples or feedback.examples_of(record)
        added = journal.add(
            connection, model, [(example, origin) for example in examples],
            heldout_fraction=config.watch.heldout_fraction, now=now, kin=Kin(connection, model),
        )  # fmt: skip
        records.settle(connection, row, "journal" if examples else "stored", f"accepted by {actor}", added.ids)
        if taught.partner:
            ratings.pair(connection, model, taught.partner, added.ids[0])
        audit.write(connection, "record.accepted", f"{model}/{identity}", {"held": row.reason}, actor)
    return added.new


def reject(connection: Connection, model: str, identity: str, actor: str) -> None:
    """Never learn from a held record; it stays stored, so that its id is known. Raises `NotHeld`."""
    row = _held(connection, model, identity)
    with transaction(connection):
        records.settle(connection, row, "rejected", f"rejected by {actor}", [])
        audit.write(connection, "record.rejected", f"{model}/{identity}", {"held": row.reason}, actor)


def accept_all(
    connection: Connection, config: Config, model: str, chosen: Chosen, actor: str, now: float
) -> tuple[int, int]:  # fmt: skip
    """Learn from everything that is held for a reason or of a subject: (records, new examples)."""
    rows = _chosen(connection, model, chosen)
    return len(rows), sum(accept(connection, config, model, row.id, actor, now) for row in rows)


def reject_all(connection: Connection, model: str, chosen: Chosen, actor: str) -> int:
    """Never learn from any of it; how many records."""
    rows = _chosen(connection, model, chosen)
    for row in rows:
        reject(connection, model, row.id, actor)
    return len(rows)


def _chosen(connection: Connection, model: str, chosen: Chosen) -> list[RecordRow]:
    return records.held(connection, model, AT_ONCE_MAX, chosen.why, chosen.subject)


def _held(connection: Connection, model: str, identity: str) -> RecordRow:
    row = records.get(connection, model, identity)
    if row is None or row.state != "held":
        state = "unknown" if row is None else row.state
        raise NotHeld(f"the record {identity} of {model} does not wait for review: it is {state}")
    return row
