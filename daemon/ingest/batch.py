"""Batch manifests: `NAME.batch.json` beside content files, `{"files": [{"path", "sha256", "size"}, ...]}`.

All of the files or none: they are taken in together, in one transaction, as soon as each has the size and the hash that
the manifest says, without the wait for a file that may still be written to. Until then, none of them is.
"""

import hashlib
import os
from typing import Annotated

import msgspec

from daemon.config import Config
from daemon.drop_names import Ignored, printable
from daemon.ingest import strict_json
from daemon.ingest.content_file import take_content
from daemon.ingest.opened import blocks, open_below, opened, signature_of
from daemon.ingest.outcome import Outcome
from daemon.ingest.place import place_of
from daemon.ingest.problem import Moved, Problem
from daemon.state import audit, batches, files, quarantine
from daemon.state.database import Connection, transaction
from daemon.state.files import FileRow, Finished

SUFFIX = ".batch.json"
BYTES_MAX = 4 * 1024 * 1024
TORN_SECONDS = 60.0
"""A manifest that is no JSON may still be written; after so long it is refused."""


class Item(msgspec.Struct, frozen=True):
    """One file of a batch."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    """Relative to the manifest's directory."""
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=0)]


class Manifest(msgspec.Struct, frozen=True):
    """What a manifest says."""

    files: Annotated[list[Item], msgspec.Meta(min_length=1, max_length=10_000)]


def read_batch(connection: Connection, config: Config, finished: Finished, descriptor: int, now: float) -> Outcome:
    """Take in every file of a batch, or none; raises `Problem` when the manifest or one of the files is bad."""
    try:
        items = _items(finished.relative, descriptor)
    except Problem as problem:
        if problem.code == "bad_manifest" or now - finished.signature.mtime_ns / 1e9 >= TORN_SECONDS:
            raise Problem("bad_manifest", f"{finished.path}: {problem.message}", stage="place") from None
        return Outcome(path=finished.path, state="waiting", reason="it is not complete")
    with transaction(connection):
        since = batches.name(connection, finished.relative, map(printable, items), now)
    lacking = _lacking(config, items)
    if lacking is None:
        return _take_in(connection, config, finished, items, now)
    if now - since >= config.watch.never_stable_seconds:
        message = f"{lacking}: the batch has waited for it too long, and none of its {len(items)} files is taken in"
        raise Problem("batch_incomplete", message, stage="place", retryable=True)
    return Outcome(path=finished.path, state="waiting", reason=lacking, awaited=tuple(items))


def _items(manifest: str, descriptor: int) -> dict[str, Item]:
    """`{path below the library: item}`; raises `Problem` (`bad_manifest`, or what is wrong with the JSON)."""
    data = os.pread(descriptor, BYTES_MAX + 1, 0)
    if len(data) > BYTES_MAX:
        raise Problem("bad_manifest", f"a manifest has at most {BYTES_MAX} bytes")
    try:
        listed = msgspec.convert(strict_json.parse(data), Manifest, strict=True).files
    except msgspec.ValidationError as error:
        raise Problem("bad_manifest", str(error)) from None
    directory = manifest.rpartition("/")[0]
    items = {f"{directory}/{_checked(each.path)}": each for each in listed}
    if len(items) < len(listed):
        raise Problem("bad_manifest", "it names a file twice")
    return items


def _checked(path: str) -> str:
    """A path that stays below the manifest's directory."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part or Ignored.is_temporary(part) for part in parts):
        raise Problem("bad_manifest", f"{printable(path)!r} is no path of a file below the manifest that would be read")
    if path.endswith(SUFFIX):
        raise Problem("bad_manifest", f"{printable(path)!r} is a manifest itself")
    return path


def _lacking(config: Config, items: dict[str, Item]) -> str | None:
    """The first file that is not there as the manifest says, or None. Sizes first: hashing takes its time."""
    for relative, item in items.items():
        try:
            if (config.library_directory / relative).lstat().st_size != item.size:
                return f"{printable(relative)} has not the size of the manifest"
        except OSError:
            return f"{printable(relative)} is not there"
    for relative, item in items.items():
        try:
            descriptor = open_below(config.library_directory, relative)
        except Moved:
            return f"{printable(relative)} is not there"
        try:
            if not _has_hash(descriptor, item):
                return f"{printable(relative)} has not the hash of the manifest"
        finally:
            os.close(descriptor)
    return None


def _has_hash(descriptor: int, item: Item) -> bool:
    digest = hashlib.sha256()
    for block in blocks(descriptor):
        digest.update(block)
    return digest.hexdigest() == item.sha256.lower()


def _take_in(
    connection: Connection, config: Config, finished: Finished, items: dict[str, Item], now: float
) -> Outcome:  # fmt: skip
    whole = Outcome(path=finished.path)
    with transaction(connection):
        for relative, item in items.items():
            one = _one(connection, config, relative, item, now)
            whole.model = one.model
            whole.count(one)
        batches.forget(connection, finished.relative)
        quarantine.remove_of(connection, finished.path)
        files.put(connection, FileRow(path=finished.path, signature=finished.signature), now)
        audit.write(connection, "batch.read", finished.path, {"files": len(items), "new": whole.new})
    return whole


def _one(connection: Connection, config: Config, relative: str, item: Item, now: float) -> Outcome:
    """One file of the batch, inside the transaction of all; raises `Problem` for the whole batch."""
    path = printable(relative)
    seen = Finished(path=path, relative=relative, signature=signature_of((config.library_directory / relative).lstat()))
    with opened(config.library_directory, seen) as descriptor:
        if not _has_hash(descriptor, item):
            raise Moved(path)  # written to since it was looked at
        try:
            return take_content(connection, config, seen, place_of(path, config.models), descriptor, now)
        except Problem as problem:
            message = f"{path}: {problem.code}: {problem.message}; nothing of the batch is taken in"
            raise Problem("batch_refused", message, stage="place", retryable=problem.retryable) from None


def read_named(connection: Connection, config: Config, finished: Finished, now: float) -> Outcome | None:
    """A content file that a manifest names: the whole batch, if it is complete now. None when none names it."""
    named = batches.of(connection, finished.path)
    if named is None:
        return None
    try:
        seen = (config.library_directory / named.manifest).lstat()
        manifest = Finished(path=printable(named.manifest), relative=named.manifest, signature=signature_of(seen))
        if files.known(connection, manifest.path) == manifest.signature:
            return _refused(connection, finished, manifest.path, now)
        with opened(config.library_directory, manifest) as descriptor:
            outcome = read_batch(connection, config, manifest, descriptor, now)
    except (OSError, Moved):  # the manifest was taken away: its files are files like any others
        with transaction(connection):
            batches.forget(connection, named.manifest)
        return None
    return outcome


def _refused(connection: Connection, finished: Finished, manifest: str, now: float) -> Outcome:
    """Its batch was refused: the file waits for another manifest, or until it is dropped anew."""
    with transaction(connection):
        files.put(connection, FileRow(path=finished.path, signature=finished.signature, state="quarantined"), now)
    return Outcome(path=finished.path, state="quarantined", reason=f"{finished.path}: its batch {manifest} was refused")
