"""Feedback files are read as they grow: complete lines only, from where the last transaction ended.

Exactly once: the rows of a batch and the offset after it are one transaction. A file that was rotated, truncated or
replaced is read from its start again, and the record ids take care of the doubles.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec

from buffers import journal
from buffers.example import Example, Origin
from daemon.config import Config
from daemon.ingest import feedback, strict_json
from daemon.ingest.lines import Line, read_lines
from daemon.ingest.opened import signature_of
from daemon.ingest.outcome import Outcome
from daemon.ingest.place import Place
from daemon.ingest.problem import Problem
from daemon.ingest.refuse import BadLine, note_lines
from daemon.state import audit, files, records
from daemon.state.database import Connection, transaction
from daemon.state.files import FileRow, Finished
from daemon.state.records import RecordRow

BATCH_LINES = 1000
BATCHES_PER_CALL = 20
"""About a second's work: the daemon's loop must turn."""
HEAD_BYTES, TAIL_BYTES = 4096, 64


class Ready(msgspec.Struct, frozen=True):
    """A record that is in order, with what can be learned from it."""

    line: Line
    identity: str
    record: feedback.Record
    examples: list[Example]
    body: bytes
    """Canonical JSON."""
    sha256: str


def read_feedback(
    connection: Connection, config: Config, finished: Finished, place: Place, descriptor: int, now: float
) -> Outcome:
    """Take in the complete lines that are new, at most `BATCHES_PER_CALL` batches of them."""
    outcome = Outcome(path=finished.path, model=place.model)
    signature = signature_of(os.fstat(descriptor))
    row = _resume(connection, finished, descriptor)
    lines = read_lines(descriptor, row.offset, row.lines + 1, line_bytes_max=config.watch.line_bytes_max)
    for _ in range(BATCHES_PER_CALL):
        batch = list(islice(lines, BATCH_LINES))
        ready, bad = _parse(batch, place.model)
        row = msgspec.structs.replace(row, signature=signature)
        row = _advanced(row, batch, descriptor, is_end=len(batch) < BATCH_LINES)
        outcome.count(_store(connection, config, place, row, ready, bad, now))
        if row.state == "read":
            return outcome
    outcome.state = "partial"
    return outcome


def _resume(connection: Connection, finished: Finished, descriptor: int) -> FileRow:
    """The row to go on from: this path's, or that of the same file under the name it had before a rotation."""
    here = files.get(connection, finished.path)
    signature = finished.signature
    for row in ([here] if here else []) + files.by_inode(connection, signature.dev, signature.ino):
        same_file = (row.signature.dev, row.signature.ino) == (signature.dev, signature.ino)
        if same_file and _marks(descriptor, row.offset) == (row.head_sha256, row.tail_sha256):
            return msgspec.structs.replace(row, path=finished.path)
    return FileRow(path=finished.path, signature=signature)


def _marks(descriptor: int, offset: int) -> tuple[str, str]:
    """Hashes of the first bytes and of the last ones before `offset`; empty strings when the file is shorter."""
    if os.fstat(descriptor).st_size < offset:
        return "", ""
    head = os.pread(descriptor, min(HEAD_BYTES, offset), 0)
    tail_bytes = min(TAIL_BYTES, offset)
    tail = os.pread(descriptor, tail_bytes, offset - tail_bytes)
    return hashlib.sha256(head).hexdigest(), hashlib.sha256(tail).hexdigest()


def _advanced(row: FileRow, batch: list[Line], descriptor: int, *, is_end: bool) -> FileRow:
    offset = batch[-1].end if batch else row.offset
    head, tail = _marks(descriptor, offset)
    # a partial row's size is what has been read: it differs from the file's, and grows with every batch
    signature = row.signature if is_end else msgspec.structs.replace(row.signature, size=offset)
    return msgspec.structs.replace(
        row, signature=signature, offset=offset, lines=row.lines + len(batch), head_sha256=head, tail_sha256=tail,
        state="read" if is_end else "partial",
    )  # fmt: skip


def _parse(batch: list[Line], model: str) -> tuple[list[Ready], list[BadLine]]:
    ready: list[Ready] = []
    bad: list[BadLine] = []
    for line in batch:
        try:
            if line.body is None:
                raise Problem("line_too_long", "the line is longer than watch.line_bytes_max and was skipped")
            if line.body.strip():
                ready.append(_ready(line, line.body, model))
        except Problem as problem:
            bad.append(BadLine(line, problem))
    return ready, bad


def _ready(line: Line, body: bytes, model: str) -> Ready:
    tree = strict_json.parse(body)
    record = feedback.read(tree, model)
    canonical = msgspec.json.encode(tree, order="deterministic")
    digest = hashlib.sha256(canonical).hexdigest()
    return Ready(line, feedback.identity(record), record, feedback.examples_of(record), canonical, digest)


def _store(
    connection: Connection, config: Config, place: Place, row: FileRow, ready: list[Ready], bad: list[BadLine],
    now: float,
) -> Outcome:  # fmt: skip
    """One batch, its bad lines and the offset after it, in one transaction."""
    outcome = Outcome(path=row.path)
    with transaction(connection):
        fresh = list(_fresh(connection, place.model, ready, bad, outcome))
        withdrawn = records.retractions_of(connection, place.model, (each.identity for each in fresh))
        wanted = {each.identity: _why_not(each, withdrawn, now) for each in fresh}
        learned = [each for each in fresh if each.examples and not wanted[each.identity]]
        added = journal.add(
            connection, place.model, _items(learned, place, row.path),
            heldout_fraction=config.watch.heldout_fraction, now=now,
        )  # fmt: skip
        ids = iter(added.ids)
        in_journal = {each.identity: [next(ids) for _ in each.examples] for each in learned}
        records.add(
            connection, (_row(each, place, wanted[each.identity], in_journal.get(each.identity, [])) for each in fresh),
            now,
        )  # fmt: skip
        outcome.retracted = sum(_retract(connection, place.model, each, bad) for each in fresh)
        note_lines(connection, row.path, bad, now)
        files.put(connection, row, now)
        outcome.new, outcome.duplicates, outcome.heldout = added.new, added.duplicates, added.heldout
        outcome.records, outcome.bad_lines = len(fresh), len(bad)
        if ready or bad:
            counted = {"records": len(fresh), "new": added.new, "bad_lines": len(bad), "offset": row.offset}
            audit.write(connection, "file.read", row.path, counted)
    return outcome


def _fresh(
    connection: Connection, model: str, ready: list[Ready], bad: list[BadLine], outcome: Outcome
) -> Iterator[Ready]:
    """Those whose id is new; the same body again is only counted, another body under the same id is a conflict."""
    known = records.known_bodies(connection, model, (each.identity for each in ready))
    for each in ready:
        before = known.get(each.identity)
        if before is None:
            known[each.identity] = each.sha256
            yield each
        elif before == each.sha256:
            outcome.repeated += 1
        else:
            message = f"the id {each.identity} is taken by a record with another body; the first one counts"
            bad.append(BadLine(each.line, Problem("id_conflict", message)))


def _why_not(ready: Ready, withdrawn: dict[str, str], now: float) -> str:
    """Why a record is not learned from, or an empty string."""
    consent = ready.record.consent
    if withdrawn.get(ready.identity) == ready.record.subject.id:
        return "withdrawn before it came"
    if consent is None:
        return ""
    if "train" not in consent.scope:
        return "no consent to training"
    return "consent expired" if consent.expires is not None and consent.expires.timestamp() <= now else ""


def _items(learned: Iterable[Ready], place: Place, path: str) -> Iterator[tuple[Example, Origin]]:
    for each in learned:
        origin = Origin(
            file=path, line=each.line.number, collection=place.collection, source=place.source,
            subject=each.record.subject.id, record_id=each.identity,
        )  # fmt: skip
        for example in each.examples:
            yield example, origin


def _row(ready: Ready, place: Place, why_not: str, ids: list[int]) -> RecordRow:
    record = ready.record
    state = "journal" if ids else "retracted" if why_not.startswith("withdrawn") else "stored"
    return RecordRow(
        model=place.model, id=ready.identity, kind=record.kind, source=place.source, subject=record.subject.id,
        body_sha256=ready.sha256, body=ready.body, state=state,
        reason=feedback.withdrawn(record) if record.kind == "retraction" else why_not,
        example_id=ids[0] if ids else None, pair_id=ids[1] if len(ids) > 1 else None,
    )  # fmt: skip


def _retract(connection: Connection, model: str, ready: Ready, bad: list[BadLine]) -> int:
    """Carry out a retraction: only the subject of a record may withdraw it."""
    if ready.record.kind != "retraction":
        return 0
    target = records.get(connection, model, feedback.withdrawn(ready.record))
    if target is None or target.state == "retracted":
        return 0
    if target.subject != ready.record.subject.id:
        message = f"the record {target.id} is another subject's: only its own subject may withdraw it"
        bad.append(BadLine(ready.line, Problem("foreign_retraction", message)))
        return 0
    return records.retract(connection, target, f"withdrawn by {ready.identity}")
