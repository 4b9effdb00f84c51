"""Into the quarantine: a bad content file is moved there whole, a bad line is noted and its file stays.

The row is written before the file is moved: killed in between, the next scan finds the file, refuses it again (which
only counts) and moves it then.
"""

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from daemon.config import Config
from daemon.ingest.lines import Line
from daemon.ingest.opened import blocks, opened
from daemon.ingest.outcome import Outcome
from daemon.ingest.problem import Moved, Problem
from daemon.log import escape
from daemon.state import audit, files, quarantine
from daemon.state.database import Connection, transaction
from daemon.state.files import FileRow, Finished
from daemon.state.quarantine import Refusal

HASHED_BYTES_MAX = 64 * 1024 * 1024
"""Of a larger file only the beginning is hashed: nobody waits for 100 GiB of zeros."""


class BadLine(msgspec.Struct, frozen=True):
    """A line that was refused, and why."""

    line: Line
    problem: Problem


def note_lines(connection: Connection, path: str, bad: list[BadLine], now: float) -> None:
    """Note bad lines, inside the caller's transaction; beyond `LINES_MAX` for one file they are only counted."""
    if not bad:
        return
    room = quarantine.LINES_MAX - quarantine.line_count(connection, path)
    for each in bad[: max(room, 0)]:
        body = each.line.body
        within = each.problem.byte_offset
        refusal = Refusal(
            path=path, line=each.line.number, byte_offset=each.line.offset + (within or 0), code=each.problem.code,
            stage=each.problem.stage, message=escape(each.problem.message), retryable=each.problem.retryable,
            sha256="" if body is None else hashlib.sha256(body).hexdigest(),
        )  # fmt: skip
        quarantine.add(connection, refusal, now, excerpt=body)
    if len(bad) > room:
        message = f"more than {quarantine.LINES_MAX} bad lines: the further ones are not listed one by one"
        refusal = Refusal(path=path, code="many_bad_lines", stage="parse", message=message)
        quarantine.add(connection, refusal, now)


def refuse(
    connection: Connection, config: Config, finished: Finished, problem: Problem, now: float, *, is_content: bool
) -> Outcome:
    """Note a whole file as bad and, if it is a content file whose bytes are at fault, move it to the quarantine."""
    movable = is_content and problem.stage in ("read", "parse")
    digest = _fingerprint(config.library_directory, finished) if movable else ""
    stored = _stored_name(finished, digest, now) if movable and digest else None
    refusal = Refusal(
        path=finished.path, line=problem.line, byte_offset=problem.byte_offset, code=problem.code,
        stage=problem.stage, message=escape(problem.message), sha256=digest, retryable=problem.retryable,
    )  # fmt: skip
    with transaction(connection):
        quarantine.add(connection, refusal, now, stored=stored)
        files.put(connection, FileRow(path=finished.path, signature=finished.signature, state="refused"), now)
        audit.write(connection, "file.quarantined", finished.path, {"code": problem.code, "sha256": digest})
    is_moved = stored is not None and _move(config.library_directory, finished, stored, refusal, now)
    with transaction(connection):
        if is_moved:
            files.forget(connection, finished.path)
        else:  # it stays where it is, and is known until it changes
            row = FileRow(path=finished.path, signature=finished.signature, state="quarantined")
            files.put(connection, row, now)
    return Outcome(path=finished.path, state="quarantined", reason=f"{problem.code}: {escape(problem.message)}")


def _fingerprint(library: Path, finished: Finished) -> str:
    """SHA-256 of what is moved, or an empty string when it is gone."""
    digest = hashlib.sha256()
    try:
        with opened(library, finished) as descriptor:
            for block in blocks(descriptor, 0, HASHED_BYTES_MAX):
                digest.update(block)
    except (Moved, Problem):
        return ""
    return digest.hexdigest()


def _stored_name(finished: Finished, digest: str, now: float) -> str:
    """`DATE/HASH.EXT` below quarantine/: the daemon's own name, whatever the file was called."""
    suffix = Path(finished.relative).suffix.lower()
    suffix = suffix if suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) <= 9 else ""
    return f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d}/{digest[:32]}{suffix}"


def _move(library: Path, finished: Finished, stored: str, refusal: Refusal, now: float) -> bool:
    """Move the file and write `.reason.json` beside it; False when that cannot be done (read-only, other device)."""
    target = library / "quarantine" / stored
    reason = {**msgspec.to_builtins(refusal), "first_seen": datetime.fromtimestamp(now, UTC).isoformat()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".reason.json")
        temporary = beside.with_name(f".{beside.name}.tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(reason)))
        temporary.replace(beside)
        os.rename(library / finished.relative, target)  # noqa: PTH104 - the name may hold any byte
    except OSError:
        return False
    return True
