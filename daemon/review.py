"""The review queue: feedback that is not believed by itself waits for somebody who knows."""

import msgspec

from buffers import journal
from buffers.example import Origin
from daemon.config import Config
from daemon.ingest import feedback
from daemon.ingest.kinship import Kin
from daemon.state import audit, records
from daemon.state.database import Connection, transaction
from daemon.state.records import RecordRow


class NotHeld(Exception):
    """There is no such record in the queue."""


def accept(connection: Connection, config: Config, model: str, identity: str, actor: str, now: float) -> int:
    """Learn from a held record; how many examples are new. Raises `NotHeld`."""
    row = _held(connection, model, identity)
    record = feedback.read(msgspec.json.decode(row.body), model)
    origin = Origin(file="", source=row.source, subject=row.subject, record_id=row.id)
    with transaction(connection):
        added = journal.add(
            connection, model, [(example, origin) for example in feedback.examples_of(record)],
            heldout_fraction=config.watch.heldout_fraction, now=now, kin=Kin(connection, model),
        )  # fmt: skip
        records.settle(connection, row, "journal", f"accepted by {actor}", added.ids)
        audit.write(connection, "record.accepted", f"{model}/{identity}", {"held": row.reason}, actor)
    return added.new


def reject(connection: Connection, model: str, identity: str, actor: str) -> None:
    """Never learn from a held record; it stays stored, so that its id is known. Raises `NotHeld`."""
    row = _held(connection, model, identity)
    with transaction(connection):
        records.settle(connection, row, "rejected", f"rejected by {actor}", [])
        audit.write(connection, "record.rejected", f"{model}/{identity}", {"held": row.reason}, actor)


def _held(connection: Connection, model: str, identity: str) -> RecordRow:
    row = records.get(connection, model, identity)
    if row is None or row.state != "held":
        state = "unknown" if row is None else row.state
        raise NotHeld(f"the record {identity} of {model} does not wait for review: it is {state}")
    return row
