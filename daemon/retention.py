"""What may be removed: old versions, leftovers of what was interrupted, bulk of old runs. Planning is pure.

Never removed: the live version, the one before it, the newest `versions_kept`, and whatever an engine lists, since an
engine whose adapter directory vanishes may die with every stream that it serves.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from daemon.state.runs import ACTIVE, Run, Version

RUNS_KEPT = 50
"""So many of the latest runs of a model keep their experience and log."""
BULK = ("experience.jsonl", "train.log", "adapter", "strategy", "checkpoint", "lock")


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """One directory or file that is of no more use."""

    path: Path
    why: Literal["old_version", "leftover", "old_run", "unknown_run", "old_search"]
    version: tuple[str, int] | None = None
    """For an old version: model and number."""


def old_versions(directory: Path, versions: list[Version], kept: int, listed: Iterable[str]) -> list[Removal]:
    """The versions of one model, beyond the newest `kept`, that nobody needs. `directory`: `STATE/versions/MODEL`.

    `listed`: names (`npc@0003`) and paths that engines have loaded.
    """
    live = next((version for version in versions if version.state == "live"), None)
    needed = {live.number, live.parent} if live is not None else set()
    in_use = set(listed)
    removals = []
    for version in sorted(versions, key=lambda each: each.number, reverse=True)[kept:]:
        path = directory / f"{version.number:04d}"
        is_used = str(path) in in_use or f"{version.model}@{version.number:04d}" in in_use
        if version.state in ("superseded", "rolled_back", "failed") and version.number not in needed and not is_used:
            removals.append(Removal(path=path, why="old_version", version=(version.model, version.number)))
    return removals


def leftovers(versions: Path, known: Iterable[Version]) -> list[Removal]:
    """Half-written version directories, and whole ones that no transaction has made known."""
    names = {(version.model, f"{version.number:04d}") for version in known}
    found = [path for path in versions.glob("*/*") if (path.parent.name, path.name) not in names]
    return [Removal(path=path, why="leftover") for path in sorted(found)]


def old_runs(directory: Path, runs: list[Run]) -> list[Removal]:
    """Directories of unknown runs, and the bulk of known ones beyond the latest. `runs`: all, newest first."""
    by_id = {run.id: place for place, run in enumerate(runs)}
    removals = []
    for path in sorted(directory.iterdir()):
        if path.name not in by_id:
            removals.append(Removal(path=path, why="unknown_run"))
        elif by_id[path.name] >= RUNS_KEPT and runs[by_id[path.name]].state not in ACTIVE:
            removals += [Removal(path=path / name, why="old_run") for name in BULK if (path / name).exists()]
    return removals


def old_searches(directory: Path, kept: int) -> list[Removal]:
    """All but the newest `kept` searches of a model that nobody is at work on. `directory`: `STATE/tuning/MODEL`."""
    found = sorted((path for path in directory.glob("*/") if path.is_dir()), key=_changed_at, reverse=True)
    return [Removal(path=path, why="old_search") for path in found[kept:] if not _is_locked(path / "lock")]


def _changed_at(search: Path) -> float:
    return max((path.stat().st_mtime for path in search.glob("*") if path.is_file()), default=0.0)


def _is_locked(path: Path) -> bool:
    """Whether a process holds this lock; one that was never made is not held."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove(removal: Removal) -> int:
    """Remove it; returns the bytes that were freed. What is gone already is no error."""
    freed = size_of(removal.path)
    if removal.path.is_dir():
        shutil.rmtree(removal.path, ignore_errors=True)
    else:
        removal.path.unlink(missing_ok=True)
    return freed


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.lstat().st_size for file in files)
