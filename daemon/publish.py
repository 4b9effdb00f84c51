"""Candidates become versions: immutable directories whose manifest, written last, names every file by its SHA-256."""

import hashlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from strategies.request import Canary, RunReport

PUBLISHED = re.compile(r"(?!manifest\.json)[A-Za-z0-9][A-Za-z0-9._-]*\.(safetensors|json)", re.ASCII)
"""Names that a version may hold: nothing that an engine would unpickle or run."""


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a version."""

    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json`: what a version consists of and where it came from."""

    format: str = "eternad.version/1"
    model: str
    number: int
    parent: int | None
    run_id: str
    update_number: int
    experience_sha256: str
    derived_sha256: str = ""
    """Of the rows that were derived from the experience's; empty for none."""
    base_sha256: str
    libraries: dict[str, str]
    created_at: float
    files: dict[str, FileEntry]
    canaries: list[Canary] = []
    """What a probe of an engine must find."""
    evaluation: dict[str, Any] = {}


class DamagedVersion(Exception):
    """A version's files are not those of its manifest; the message names the file."""


class UnexpectedFile(Exception):
    """A candidate holds something that no version may; the message names it."""


def directory_of(versions: Path, model: str, number: int) -> Path:
    """`STATE/versions/MODEL/NNNN`."""
    return versions / model / f"{number:04d}"


def publish(run_directory: Path, destination: Path, manifest: Manifest) -> str:
    """Copy a run's adapter and strategy state to `destination`; returns the SHA-256 of the manifest.

    Everything is written under a temporary name, the manifest last, and renamed at once. Doing it again after a crash
    gives the same version; what a different run left half done under this number is replaced.
    """
    if (found := read_manifest(destination)) is not None and found.run_id == manifest.run_id:
        verify(destination)
        return _sha256(destination / "manifest.json")
    partial = destination.with_name(f".{destination.name}.tmp")
    for leftover in (partial, destination):
        _remove(leftover)
    partial.mkdir(parents=True)
    files = dict(_copy(run_directory / "adapter", partial, ""))
    if (run_directory / "strategy").is_dir():
        files |= dict(_copy(run_directory / "strategy", partial / "strategy", "strategy/"))
    manifest = msgspec.structs.replace(manifest, files=files, created_at=time.time())
    _write_durably(partial / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    _sync(partial)
    partial.rename(destination)
    _sync(destination.parent)
    return _sha256(destination / "manifest.json")


def manifest_of(report: RunReport, **lineage: Any) -> Manifest:
    """The manifest of a report's candidate, still without files."""
    evaluation = msgspec.to_builtins(report.evaluation) if report.evaluation is not None else {}
    return Manifest(
        base_sha256=report.base_sha256, derived_sha256=report.derived_sha256, libraries=report.libraries,
        canaries=report.canaries,
        evaluation=evaluation, files={}, created_at=0.0, **lineage,
    )  # fmt: skip


def read_manifest(version: Path) -> Manifest | None:
    """The manifest of a version directory, or None when the directory is not a whole version."""
    try:
        return msgspec.json.decode((version / "manifest.json").read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def verify(version: Path) -> Manifest:
    """Compare every file with the manifest; raises `DamagedVersion` naming the first that differs."""
    manifest = read_manifest(version)
    if manifest is None:
        raise DamagedVersion(f"{version}: no readable manifest.json; roll back to another version")
    for name, entry in manifest.files.items():
        path = version / name
        if not path.is_file() or path.stat().st_size != entry.size or _sha256(path) != entry.sha256:
            raise DamagedVersion(f"{path} is not the file that was published; roll back to another version")
    return manifest


def unfinished(versions: Path) -> list[Path]:
    """What an interrupted `publish` has left: never visible under a version's name, to be removed by `gc`."""
    return sorted(versions.glob("*/.*.tmp"))


def _copy(source: Path, target: Path, prefix: str) -> list[tuple[str, FileEntry]]:
    target.mkdir(exist_ok=True)
    entries = []
    for path in sorted(source.iterdir()):
        _check(path)
        data = path.read_bytes()
        _write_durably(target / path.name, data)
        entries.append((prefix + path.name, FileEntry(hashlib.sha256(data).hexdigest(), len(data))))
    _sync(target)
    return entries


def _check(path: Path) -> None:
    if path.is_symlink() or not path.is_file() or not PUBLISHED.fullmatch(path.name):
        raise UnexpectedFile(f"{path} is not published: a version holds plain files *.safetensors and *.json only")


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o444)  # immutable: engines map these files


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
