"""`eternad erase --subject h:...`: a person's data leaves everything that the daemon keeps, and a receipt says so.

What a version has learned cannot be deleted from its weights: the receipt lists those versions, and by the operator's
policy they are trained again from the last clean one, retired, or documented. Files in the drop directory belong to
whoever drops them: the receipt lists those as well, and what is dropped again is refused.
"""

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from buffers import erasure, experience
from daemon.config import Config
from daemon.state import audit, likeness, runs, subjects
from daemon.state.database import Connection, transaction
from strategies.request import write

_SUBJECT = re.compile(r"h:[A-Za-z0-9_-]{8,128}")


class CannotErase(Exception):
    """The request cannot be carried out; the message says why and what to do."""


class InUse(CannotErase):
    """A run at work has the data."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"the run {run_id} is learning from it: cancel that run first, then erase")
        self.run_id = run_id


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What an erasure did; kept as JSON under `STATE/receipts/`."""

    format: str = "eternad.erasure/1"
    subject_sha256: str
    """The pseudonym itself is not kept."""
    erased_at: str
    records: int
    examples: int
    handed_over: int
    """Examples that another subject gave as well: they stay, as that one's."""
    runs_scrubbed: list[str]
    """Run directories from whose experience the rows were taken out."""
    versions: dict[str, list[int]]
    """By model: versions that have learned from the data, or go on from one that has."""
    files: list[str]
    """Dropped files that hold the data: to be cleaned by whoever dropped them."""


def erase(connection: Connection, config: Config, subject: str, now: float) -> Receipt:
    """Erase a subject; twice does no harm. Raises `InUse` while a run at work has the data: cancel that first."""
    if not _SUBJECT.fullmatch(subject):
        raise CannotErase("a subject is `h:` and 8 to 128 of A-Z a-z 0-9 _ -, as in the records")
    with transaction(connection):
        handed_over = subjects.hand_over(connection, subject)
        forgotten = erasure.forget(connection, subject)
        _check_no_run_uses(connection, config, forgotten)
        records = subjects.forget_records(connection, subject)
        subjects.bury(connection, subject, now)
        likeness.forget_orphans(connection)
        versions = dict(_versions(connection, forgotten.learned_in))
        told = {"records": records, "examples": len(forgotten.examples), "versions": versions}
        audit.write(connection, "subject.erased", subjects.fingerprint(subject), told)
    _drop_cached(config.state_directory / "cache" / "derived", forgotten.hashes)
    _drop_standings(config.state_directory / "cache" / "standing")
    receipt = Receipt(
        subject_sha256=subjects.fingerprint(subject), erased_at=datetime.fromtimestamp(now, UTC).isoformat(),
        records=records, examples=len(forgotten.examples), handed_over=handed_over,
        runs_scrubbed=sorted(
            name
            for place in ("runs", "tuning")
            for name in dict.fromkeys(_scrub_runs(config.state_directory / place, set(forgotten.examples)))
        ),
        versions=versions, files=forgotten.files,
    )  # fmt: skip
    subjects.scrub(connection)
    _keep(config.state_directory / "receipts", receipt, now)
    return receipt


def _check_no_run_uses(connection: Connection, config: Config, forgotten: erasure.Forgotten) -> None:
    """A run at work may have the examples as new ones, or rehearse them."""
    ids = set(forgotten.examples)
    for run in runs.active(connection):
        path = config.state_directory / "runs" / run.id / "experience.jsonl"
        rehearses = path.exists() and any(row.id in ids for row in experience.read(path))
        if run.id in forgotten.claimed_by or rehearses:
            raise InUse(run.id)


def _versions(connection: Connection, learned_in: list[tuple[str, int]]) -> Iterator[tuple[str, list[int]]]:
    first: dict[str, int] = {}
    for model, update in learned_in:
        first[model] = min(update, first.get(model, update))
    for model, update in first.items():
        yield model, subjects.versions_since(connection, model, update)


def _scrub_runs(directory: Path, ids: set[int]) -> Iterator[str]:
    """Write every experience that holds one of the examples, or rows derived from one, anew without it."""
    found = (path for name in ("experience.jsonl", "derived.jsonl") for path in directory.rglob(name))
    for path in sorted(found) if ids else []:
        rows = list(experience.read(path))
        kept = [row for row in rows if row.id not in ids]
        if len(kept) < len(rows):
            _overwrite(path, b"".join(msgspec.json.encode(row) + b"\n" for row in kept))
            yield path.parent.name


def _drop_cached(directory: Path, hashes: list[str]) -> None:
    """What a teacher has said of the examples."""
    for path in (path for digest in hashes for path in directory.glob(f"{digest}.*.txt")):
        _overwrite(path, b"")
        path.unlink()


def _drop_standings(directory: Path) -> None:
    """What models have said about hold-outs: losses by hashes of their words. Made anew by the next update."""
    for path in directory.glob("*.safetensors"):
        _overwrite(path, b"")
        path.unlink()


def _overwrite(path: Path, data: bytes) -> None:
    """Replace a file atomically, then blot out what it was: a mere rename would leave the old blocks as they were."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    with path.open("r+b") as old:
        size = path.stat().st_size
        temporary.replace(path)
        old.write(b"\0" * size)
        old.flush()
        os.fsync(old.fileno())


def _keep(directory: Path, receipt: Receipt, now: float) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    day = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")
    write(directory / f"{day}-{receipt.subject_sha256[:16]}.json", receipt)
