"""Looks over the whole state directory and says what is wrong and what to do. It only reads, also beside a daemon."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from daemon import publish, retention
from daemon.config import Config
from daemon.state import audit, integrity, runs
from daemon.state.database import Connection, DatabaseError, missing_migrations, open_read_only
from daemon.wording import size

Level = Literal["good", "note", "bad"]
SHOWN_MAX = 10


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one question. `note`: worth knowing, and the daemon mends it or can live with it."""

    check: str
    level: Level
    text: str
    """What was found; if it is not good, what to do."""


def examine(config: Config) -> list[Finding]:
    """Every check in its order; one that breaks off is itself a finding."""
    path = config.state_directory / "eternad.db"
    return [*_of_database(config, path), *_surroundings(config)]


def _of_database(config: Config, path: Path) -> list[Finding]:
    if not path.exists():
        text = f"{path} does not exist: the daemon has not run yet"
        return [Finding(check="database", level="note", text=text)]
    try:
        connection = open_read_only(path)
    except DatabaseError as error:
        return [_damaged(path, [str(error)])]
    try:
        return [_check(name, config, connection) for name in _CHECKS]
    finally:
        connection.close()


def _check(name: str, config: Config, connection: Connection) -> Finding:
    try:
        level, text = _CHECKS[name](config, connection)
    except DatabaseError as error:
        return Finding(check=name, level="bad", text=f"cannot be read ({error}); {_RESTORE}")
    except OSError as error:
        return Finding(check=name, level="bad", text=f"cannot be read: {error}")
    return Finding(check=name, level=level, text=text)


_RESTORE = "stop the daemon and run: eternad restore BACKUP"


def _damaged(path: Path, problems: list[str]) -> Finding:
    said = "; ".join(problems[:SHOWN_MAX])
    return Finding(check="database", level="bad", text=f"{path} is damaged ({said}): {_RESTORE}")


def _database(config: Config, connection: Connection) -> tuple[Level, str]:
    if problems := integrity.problems(connection):
        finding = _damaged(config.state_directory / "eternad.db", problems)
        return finding.level, finding.text
    return "good", "every page and index is consistent"


def _schema(_config: Config, connection: Connection) -> tuple[Level, str]:
    older, newer = missing_migrations(connection)
    if newer:
        return "bad", f"written by a newer eternad ({', '.join(sorted(newer))}): install that one"
    return ("note", f"{len(older)} migrations are made at the next start") if older else ("good", "up to date")


def _audit(_config: Config, connection: Connection) -> tuple[Level, str]:
    if (broken := audit.broken_at(connection)) is not None:
        return "bad", f"the audit log was changed at row {broken}: compare with a backup"
    return "good", "the chain of hashes holds"


def _versions(config: Config, connection: Connection) -> tuple[Level, str]:
    kept = [version for version in runs.versions(connection) if version.state not in ("removed", "failed")]
    damaged = list(_damaged_versions(config.state_directory / "versions", kept))
    if damaged:
        return "bad", "; ".join(damaged[:SHOWN_MAX])
    return "good", f"{len(kept)} versions have the files of their manifests"


def _damaged_versions(directory: Path, versions: list[runs.Version]) -> Iterator[str]:
    for version in versions:
        path = publish.directory_of(directory, version.model, version.number)
        live = " (it is live)" if version.state == "live" else ""
        try:
            publish.verify(path)
        except publish.DamagedVersion as error:
            yield f"{error}, or restore it from a backup{live}"
            continue
        if hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest() != version.manifest_sha256:
            yield f"{path}/manifest.json is not the one that was published: restore it from a backup{live}"


def _orphans(config: Config, connection: Connection) -> tuple[Level, str]:
    if runs.active(connection):
        return "good", "a run is at work: not looked for"
    state = config.state_directory
    found = retention.leftovers(state / "versions", runs.versions(connection))
    if (state / "runs").is_dir():
        found += [each for each in retention.old_runs(state / "runs", runs.recent(connection, limit=-1))
                  if each.why == "unknown_run"]  # fmt: skip
    if found:
        names = ", ".join(str(each.path) for each in found[:SHOWN_MAX])
        return "note", f"{len(found)} directories that nothing refers to: {names}; `eternad gc` removes them"
    return "good", "no directory without a row"


_CHECKS: dict[str, Callable[[Config, Connection], tuple[Level, str]]] = {
    "database": _database, "schema": _schema, "audit": _audit, "versions": _versions, "orphans": _orphans,
}  # fmt: skip


def _surroundings(config: Config) -> Iterator[Finding]:
    yield _disk(config)
    yield _permissions(config)
    yield _library(config)


def _disk(config: Config) -> Finding:
    place = _nearest(config.state_directory)
    disk = os.statvfs(place)
    free, floor = disk.f_bavail * disk.f_frsize, config.disk_free_bytes_min
    if disk.f_flag & os.ST_RDONLY:
        return Finding(check="disk", level="bad", text=f"{place} is on a read-only file system: mount it writable")
    if disk.f_files and not disk.f_favail:
        return Finding(check="disk", level="bad", text=f"{place}: no inode is left: remove files")
    text = f"{size(free)} are free where the state lies; no update starts below {size(floor)}"
    return Finding(check="disk", level="bad" if free < floor else "good", text=text)


def _permissions(config: Config) -> Finding:
    directory = config.state_directory
    if not directory.exists():
        return Finding(check="permissions", level="note", text=f"{directory} is made at the first start")
    locked = [path for path in (directory, *directory.iterdir()) if not os.access(path, os.R_OK)]
    if locked or not os.access(directory, os.W_OK):
        text = f"{locked[0] if locked else directory} is not ours to use: chown it to the daemon's user"
        return Finding(check="permissions", level="bad", text=text)
    if directory.stat().st_mode & stat.S_IRWXO:
        text = f"anybody on this machine can look into {directory}, where players' words are: chmod o-rwx {directory}"
        return Finding(check="permissions", level="note", text=text)
    return Finding(check="permissions", level="good", text="the state directory is ours and nobody else's")


def _library(config: Config) -> Finding:
    library = config.library_directory
    if not os.access(library, os.R_OK | os.X_OK):
        text = f"{library} cannot be read: mount it, or chown it to the daemon's user"
        return Finding(check="library", level="bad" if library.exists() else "note", text=text)
    return Finding(check="library", level="good", text=f"{library} can be read")


def _nearest(directory: Path) -> Path:
    while not directory.exists():
        directory = directory.parent
    return directory
