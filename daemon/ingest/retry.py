"""What an operator does with the quarantine: try an entry again, or drop it."""

import os
from pathlib import Path

from buffers import journal
from buffers.example import Origin
from daemon.config import Config
from daemon.drop_names import real_name
from daemon.ingest import rows, strict_json
from daemon.ingest.feedback_store import parse_lines, store
from daemon.ingest.kinship import Kin
from daemon.ingest.lines import Line
from daemon.ingest.outcome import Outcome
from daemon.ingest.place import place_of
from daemon.ingest.problem import Problem
from daemon.ingest.refuse import BadLine
from daemon.state import audit, files, quarantine
from daemon.state.database import Connection, transaction
from daemon.state.quarantine import EXCERPT_BYTES, QuarantineRow
from daemon.trust.policy import rules_of


class CannotRetry(Exception):
    """The entry cannot be tried again; the message says why and what to do."""


def retry_all(connection: Connection, config: Config, now: float) -> list[str]:
    """Try every entry that may succeed after a change of the configuration; one sentence for each."""
    said = []
    for row in quarantine.rows(connection):
        if row.retryable:
            try:
                said.append(retry(connection, config, row.id, now))
            except CannotRetry as error:
                said.append(str(error))
    return said


def retry(connection: Connection, config: Config, identity: int, now: float) -> str:
    """Try one entry again; a whole file is read by the next scan (ask the watcher for one). Says what was done.

    Raises `CannotRetry`: no such entry, its bytes are gone, or a line that is still bad.
    """
    row = _get(connection, identity)
    if row.line is None:
        return _retry_file(connection, config, row)
    return _retry_line(connection, config, row, now)


def drop(connection: Connection, config: Config, identity: int) -> str:
    """Forget an entry and delete what was kept of it. A file that stayed in its place stays, and is not read again."""
    row = _get(connection, identity)
    with transaction(connection):
        quarantine.remove(connection, identity)
        audit.write(connection, "quarantine.dropped", row.path, {"code": row.code, "sha256": row.sha256})
    if row.stored:
        kept = config.library_directory / "quarantine" / row.stored
        for path in (kept, kept.with_name(kept.name + ".reason.json")):
            path.unlink(missing_ok=True)
    return f"dropped {row.path}" + ("" if row.line is None else f", line {row.line}")


def _get(connection: Connection, identity: int) -> QuarantineRow:
    row = quarantine.get(connection, identity)
    if row is None:
        raise CannotRetry(f"the quarantine has no entry {identity}: see `eternad quarantine ls`")
    return row


def _retry_file(connection: Connection, config: Config, row: QuarantineRow) -> str:
    place = config.library_directory / real_name(row.path)
    if row.stored:
        _put_back(config.library_directory / "quarantine" / row.stored, place)
    elif not os.path.lexists(place):
        raise CannotRetry(f"{row.path} is gone: drop it again, and the entry with `eternad quarantine drop {row.id}`")
    with transaction(connection):
        files.forget(connection, row.path)
        quarantine.remove(connection, row.id)
        audit.write(connection, "quarantine.retried", row.path, {"code": row.code, "sha256": row.sha256})
    return f"{row.path} is read again"


def _put_back(kept: Path, place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(kept, place)  # never over a file that has taken its place since
        kept.unlink()
        kept.with_name(kept.name + ".reason.json").unlink(missing_ok=True)
    except FileExistsError:
        raise CannotRetry(f"{place} exists: rename one of the two first (the refused one is {kept})") from None
    except OSError as error:
        raise CannotRetry(f"{kept} cannot be moved back to {place}: {error.strerror}") from None


def _retry_line(connection: Connection, config: Config, row: QuarantineRow, now: float) -> str:
    if row.excerpt is None or len(row.excerpt) >= EXCERPT_BYTES:
        raise CannotRetry(
            f"line {row.line} of {row.path} is too long to be kept: mend it in the file, which is re-read"
        )
    line = Line(row.line or 1, row.byte_offset or 0, 0, row.excerpt)
    try:
        with transaction(connection):
            quarantine.remove(connection, row.id)
            outcome = _take_in(connection, config, row.path, line, row.excerpt, now)
            audit.write(connection, "quarantine.retried", row.path, {"code": row.code, "line": row.line})
    except Problem as problem:  # rolled back: the entry is still there
        raise CannotRetry(f"line {row.line} of {row.path} is still bad: {problem.message}") from None
    return f"line {row.line} of {row.path} was taken in: {outcome.new} new, {outcome.duplicates} duplicates"


def _take_in(connection: Connection, config: Config, path: str, line: Line, body: bytes, now: float) -> Outcome:
    place = place_of(path, config.models)
    if place.area == "feedback":
        bad: list[BadLine]
        ready, bad = parse_lines([line], place.model, rules_of(config.trust, place.source).redact)
        outcome = Outcome(path=path) if bad else store(connection, config, place, path, ready, bad, now)
        if bad:
            raise bad[0].problem
        return outcome
    origin = Origin(file=path, line=line.number, collection=place.collection)
    added = journal.add(
        connection, place.model, [(rows.example_of(strict_json.parse(body)), origin)],
        heldout_fraction=config.watch.heldout_fraction, split="eval" if place.area == "eval" else None, now=now,
        kin=Kin(connection, place.model),
    )  # fmt: skip
    return Outcome(path=path, new=added.new, duplicates=added.duplicates)
