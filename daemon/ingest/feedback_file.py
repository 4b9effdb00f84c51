"""Feedback files are read as they grow: complete lines only, from where the last transaction ended.

Exactly once: the rows of a batch and the offset after it are one transaction. A file that was rotated, truncated or
replaced is read from its start again, and the record ids take care of the doubles.
"""

import hashlib
import os
import time
from itertools import islice

import msgspec

from daemon.config import Config
from daemon.ingest.feedback_store import parse_lines, store
from daemon.ingest.lines import Line, read_lines
from daemon.ingest.opened import signature_of
from daemon.ingest.outcome import Outcome
from daemon.ingest.place import Place
from daemon.state import audit, files
from daemon.state.database import Connection, transaction
from daemon.state.files import FileRow, Finished
from daemon.trust.policy import rules_of

BATCH_LINES = 1000
BATCHES_PER_CALL, TURN_SECONDS = 20, 1.0
"""What comes first ends a call: the daemon's loop must turn."""
HEAD_BYTES, TAIL_BYTES = 4096, 4096
"""The tail holds whole records with their ids: the last 64 bytes are the same in every record of one producer."""


def read_feedback(
    connection: Connection, config: Config, finished: Finished, place: Place, descriptor: int, now: float
) -> Outcome:
    """Take in the complete lines that are new, at most `BATCHES_PER_CALL` batches of them and about a second long."""
    outcome = Outcome(path=finished.path, model=place.model)
    signature = signature_of(os.fstat(descriptor))
    row = _resume(connection, finished, descriptor, now)
    lines = read_lines(descriptor, row.offset, row.lines + 1, line_bytes_max=config.watch.line_bytes_max)
    ends = time.monotonic() + TURN_SECONDS
    for number in range(BATCHES_PER_CALL):
        if number and time.monotonic() >= ends:
            break
        batch = list(islice(lines, BATCH_LINES))
        row = msgspec.structs.replace(row, signature=signature)
        row = _advanced(row, batch, descriptor, is_end=len(batch) < BATCH_LINES)
        outcome.count(_store(connection, config, place, row, batch, now))
        if row.state == "read":
            return outcome
    outcome.state = "partial"
    return outcome


def _resume(connection: Connection, finished: Finished, descriptor: int, now: float) -> FileRow:
    """The row to go on from: this path's, or that of the same file under the name it had before a rotation."""
    here, signature = files.get(connection, finished.path), finished.signature
    fitting = [
        row for row in ([here] if here else []) + files.by_inode(connection, signature.dev, signature.ino)
        if _inode(row) == (signature.dev, signature.ino)
        and _marks(descriptor, row.offset) == (row.head_sha256, row.tail_sha256)
    ]  # fmt: skip
    with transaction(connection):
        if here is not None and _inode(here) != (signature.dev, signature.ino):
            files.set_aside(connection, here.path, now)
        if fitting and fitting[0].path != finished.path:
            files.forget(connection, fitting[0].path)
            files.put(connection, msgspec.structs.replace(fitting[0], path=finished.path, state="partial"), now)
    if fitting:
        return msgspec.structs.replace(fitting[0], path=finished.path)
    return FileRow(path=finished.path, signature=signature)


def _inode(row: FileRow) -> tuple[int, int]:
    return row.signature.dev, row.signature.ino


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


def _store(
    connection: Connection, config: Config, place: Place, row: FileRow, batch: list[Line], now: float
) -> Outcome:
    """One batch, its bad lines and the offset after it, in one transaction."""
    ready, bad = parse_lines(batch, place.model, rules_of(config.trust, place.source).redact)
    with transaction(connection):
        outcome = store(connection, config, place, row.path, ready, bad, now)
        files.put(connection, row, now)
        if ready or bad:
            counted = {"records": outcome.records, "new": outcome.new, "bad_lines": outcome.bad_lines}
            audit.write(connection, "file.read", row.path, {**counted, "offset": row.offset})
    return outcome
