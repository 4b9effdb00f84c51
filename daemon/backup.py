"""A copy of everything that cannot be made anew, taken beside a running daemon, and brought back after being checked.

    DIR/eternad.db                       by SQLite's online backup
    DIR/versions/MODEL/NNNN/...          every version that can serve
    DIR/runs/RUN/{request,report}.json, experience.jsonl
    DIR/quarantine/..., DIR/receipts/... files that were refused; receipts of erasures
    DIR/manifest.json                    the SHA-256 of every file, written last

The library itself is not in it: its files lie where they were dropped, and what came after the backup is found by the
scan at the next start and taken in again.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from daemon import publish
from daemon.publish import FileEntry
from daemon.state import audit, integrity, runs
from daemon.state.database import Connection, DatabaseError, missing_migrations, open_read_only

FORMAT = "eternad.backup/1"
OF_RUNS = ("request.json", "report.json", "experience.jsonl")
WHOLE = ("quarantine", "receipts")
OF_STATE = ("eternad.db", "eternad.db-wal", "eternad.db-shm", "versions", "runs", *WHOLE)


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json` of a backup."""

    format: str = FORMAT
    created_at: float
    files: dict[str, FileEntry]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


class CannotBackUp(Exception):
    """The backup cannot be made; the message says why and what to do."""


class CannotRestore(Exception):
    """The backup cannot be used, or not now; the message says why. Nothing was changed."""


def make(state: Path, target: Path, now: float) -> Backup:
    """Write a backup of a state directory to `target`, which must be empty or not exist; raises `CannotBackUp`."""
    if target.exists() and any(target.iterdir()):
        raise CannotBackUp(f"{target} is not empty: give a directory that does not exist yet")
    if target.resolve().is_relative_to(state.resolve()):
        raise CannotBackUp(f"{target} is inside of the state directory: give a place on another disk")
    target.mkdir(parents=True, exist_ok=True)
    connection = open_read_only(state / "eternad.db")
    try:
        integrity.copy(connection, target / "eternad.db")
    finally:
        connection.close()
    _copy_files(state, target)
    backup = Backup(created_at=now, files=_entries(target))
    _write(target / "manifest.json", msgspec.json.format(msgspec.json.encode(backup), indent=1))
    verify(target)
    return backup


def _copy_files(state: Path, target: Path) -> None:
    """What the copied database speaks of: it is older than the files, so that each that it needs is there."""
    copied = open_read_only(target / "eternad.db")
    try:
        for source in _sources(state, copied):
            place = target / source.relative_to(state)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
            _sync(place)
    except FileNotFoundError as error:
        raise CannotBackUp(f"{error.filename} was removed meanwhile: remove {target} and start again") from None
    finally:
        copied.close()


def _sources(state: Path, copied: Connection) -> Iterator[Path]:
    for version in _kept(copied):
        yield from _below(publish.directory_of(state / "versions", version.model, version.number))
    for run in runs.recent(copied, limit=-1):
        directory = state / "runs" / run.id
        yield from (directory / name for name in OF_RUNS if (directory / name).exists())
    for name in WHOLE:
        yield from _below(state / name)


def _kept(connection: Connection) -> list[runs.Version]:
    return [version for version in runs.versions(connection) if version.state not in ("removed", "failed")]


def _below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _entries(target: Path) -> dict[str, FileEntry]:
    return {str(path.relative_to(target)): FileEntry(_sha256(path), path.stat().st_size) for path in _below(target)}


def verify(source: Path) -> Backup:
    """Compare every file with the manifest and look the database through; raises `CannotRestore`."""
    try:
        backup = msgspec.json.decode((source / "manifest.json").read_bytes(), type=Backup)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        raise CannotRestore(f"{source} is no whole backup: its manifest.json is missing or damaged") from None
    if backup.format != FORMAT:
        raise CannotRestore(f"{source}: the format {backup.format} is not known: restore it with a newer eternad")
    for name, entry in backup.files.items():
        path = source / name
        if not path.is_file() or _sha256(path) != entry.sha256:
            raise CannotRestore(f"{path} is not the file that was backed up: take another backup")
    _verify_database(source)
    return backup


def _verify_database(source: Path) -> None:
    connection = open_read_only(source / "eternad.db")
    try:
        problems = integrity.problems(connection)
        if newer := missing_migrations(connection)[1]:
            problems.append(f"written by a newer eternad ({', '.join(sorted(newer))})")
        if (broken := audit.broken_at(connection)) is not None:
            problems.append(f"the audit log was changed at row {broken}")
        for version in _kept(connection):
            publish.verify(publish.directory_of(source / "versions", version.model, version.number))
    except (DatabaseError, publish.DamagedVersion) as error:
        problems = [str(error)]
    finally:
        connection.close()
    if problems:
        raise CannotRestore(f"{source}: {'; '.join(problems)}")


def restore(source: Path, state: Path, now: float) -> tuple[Backup, Path | None]:
    """Put a verified backup in the place of the state; returns it and where the state of before now lies.

    The copy is made beside the state first: a disk that is too small changes nothing. What was there is moved aside,
    never removed. Raises `CannotRestore`.
    """
    backup = verify(source)
    state.mkdir(parents=True, exist_ok=True)
    with _alone(state):
        arriving = state / ".restore.tmp"
        shutil.rmtree(arriving, ignore_errors=True)
        for name in backup.files:
            (arriving / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, arriving / name)
            _sync(arriving / name)
        shutil.copyfile(source / "manifest.json", arriving / "manifest.json")
        verify(arriving)
        return backup, _exchange(state, arriving, now)


def _exchange(state: Path, arriving: Path, now: float) -> Path | None:
    before = state / f"before-restore-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}"
    old = [state / name for name in OF_STATE if (state / name).exists()]
    for path in old:
        before.mkdir(exist_ok=True)
        path.rename(before / path.name)
    (arriving / "manifest.json").unlink()
    for path in sorted(arriving.iterdir(), reverse=True):  # versions and runs before the database that names them
        path.rename(state / path.name)
    arriving.rmdir()
    _sync(state)
    return before if old else None


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Hold the daemon's lock: nobody else works on this state meanwhile."""
    with (state / "daemon.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise CannotRestore(f"the daemon with pid {lock.read().strip()} uses {state}: stop it first") from None
        yield


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
