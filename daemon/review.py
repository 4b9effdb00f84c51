"""The review queue: feedback that is not believed by itself waits for somebody who knows."""

from collections.abc import Iterator

import msgspec

from buffers import journal
from buffers.example import Example, Origin
from daemon.config import Config
from daemon.ingest import feedback
from daemon.ingest.kinship import Kin
from daemon.ingest.ratings import Ratings
from daemon.state import audit, ratings, records, vetting
from daemon.state.database import Connection, transaction
from daemon.state.records import RecordRow
from daemon.trust import association
from daemon.trust.association import Pair, Telling
from daemon.trust.likeness import asked
from daemon.trust.policy import Trust, trusted_sources

AT_ONCE_MAX = 10_000
"""One order decides about at most so many records; the next one about the rest."""


class Chosen(msgspec.Struct, frozen=True):
    """Which held records are meant."""

    why: str | None = None
    subject: str | None = None


class NotHeld(Exception):
    """There is no such record in the queue."""


def hold_associations(connection: Connection, trust: Trust, model: str) -> int:
    """Hold back what looks like a backdoor before an update takes it; how many records. In the caller's transaction.

    What is held for another reason already is looked at, too, so that those who sent it are named; but it is not held
    against anybody who is believed.
    """
    least, trusted = trust.association_records_min, trusted_sources(trust)
    if not least:
        return 0
    tellings = [
        _telling(identity, example, waits) for identity, example, waits in vetting.taught(connection, model, trusted)
        if example.label is not False
    ]  # fmt: skip
    if not any(each.waits for each in tellings):
        return 0
    known = _Writers(connection, model, trusted).have_said
    found = association.suspects(tellings, least, known)
    held = vetting.hold(connection, ((identity, pair.reason) for identity, pair in found.items()), ASSOCIATION)
    already = list(_held_tellings(connection, model))
    worse = association.suspects([*tellings, *already], least, known) if already else {}
    vetting.rename(connection, ((-place, pair.reason) for place, pair in worse.items() if place < 0), ASSOCIATION)
    if held:
        reasons = sorted({pair.reason for pair in found.values()})
        audit.write(connection, "records.held", model, {"records": held, "why": ASSOCIATION, "reasons": reasons[:5]})
    return held


ASSOCIATION = "association"


def _telling(identity: int, example: Example, waits: bool) -> Telling:
    return Telling(identity, asked(example), example.completion, waits)


def _held_tellings(connection: Connection, model: str) -> Iterator[Telling]:
    """What held records would teach; each goes by its place in the table, below zero."""
    for place, body in vetting.held(connection, model):
        told = feedback.examples_of(feedback.read(msgspec.json.decode(body), model))[:1]
        yield from (_telling(-place, example, waits=True) for example in told if example.label is not False)


WORDS_MAX = 64
"""So many words of one update are looked for in the content: the daemon's loop must turn. Others are as if unknown."""


class _Writers:
    """What writers and staff have said, asked for word by word."""

    def __init__(self, connection: Connection, model: str, trusted: list[str]) -> None:
        self._connection, self._model, self._trusted = connection, model, trusted
        self._holding: dict[str, set[int]] = {}

    def have_said(self, pair: Pair) -> bool:
        """Whether one of their examples holds all words of both phrases."""
        rows: set[int] | None = None
        for word in sorted({*pair.answer.split(), *pair.asked.split()}, key=len, reverse=True):
            if word not in self._holding and len(self._holding) >= WORDS_MAX:
                return False
            if word not in self._holding:
                self._holding[word] = vetting.holding(self._connection, self._model, self._trusted, word)
            rows = self._holding[word] if rows is None else rows & self._holding[word]
            if not rows:
                return False
        return True


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
        vetting.restore(connection, added.ids)
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
