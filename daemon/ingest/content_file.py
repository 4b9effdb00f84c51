"""Content files become examples, the whole file in one transaction."""

import hashlib
import os
import re
from collections.abc import Iterator

import msgspec

from buffers import journal
from buffers.example import Example, Origin, Split
from daemon.config import Config, Watch
from daemon.ingest import content_text, decontaminate, metadata, sandbox
from daemon.ingest.decontaminate import Item
from daemon.ingest.kinship import Kin
from daemon.ingest.metadata import Metadata
from daemon.ingest.opened import blocks, signature_of
from daemon.ingest.outcome import Outcome
from daemon.ingest.place import Place
from daemon.ingest.problem import Moved, Problem
from daemon.ingest.prose import Located
from daemon.ingest.refuse import BadLine, note_lines
from daemon.state import audit, documents, files, quarantine
from daemon.state.database import Connection, transaction
from daemon.state.files import FileRow, Finished
from daemon.state.quarantine import Refusal

PLAIN = {"txt": content_text.read_txt, "md": content_text.read_md}
SANDBOXED = ("json", "yaml", "yml", "csv", "tsv", "html", "htm", "epub", "docx", "pdf")
_SUFFIX = re.compile(rf".*?\.((?:txt|md|jsonl)(?:\.(?:gz|zst))?|{'|'.join(SANDBOXED)})", re.DOTALL | re.IGNORECASE)


class _Reading(msgspec.Struct):
    """Everything about one file on its way into the journal."""

    place: Place
    row: FileRow
    metadata: Metadata
    suffix: str
    bad: list[BadLine] = []
    contaminated: list[Item] = []
    """Examples that stand in `eval/`."""


def read_content(
    connection: Connection, config: Config, finished: Finished, place: Place, descriptor: int, now: float
) -> Outcome:
    """Take in one content file; the same bytes as before are only noted. Raises `Problem` for a file that is bad."""
    with transaction(connection):
        return take_content(connection, config, finished, place, descriptor, now)


def take_content(
    connection: Connection, config: Config, finished: Finished, place: Place, descriptor: int, now: float
) -> Outcome:
    """The same inside the caller's transaction, for files that are taken in together."""
    suffix = _suffix(finished.path, place.name)
    signature = signature_of(os.fstat(descriptor))
    _check_size(signature.size, config.watch)
    row = FileRow(path=finished.path, signature=signature, sha256=_digest(descriptor))
    before = files.get(connection, finished.path)
    if before is not None and before.sha256 == row.sha256:
        files.put(connection, row, now)
        return Outcome(path=finished.path, model=place.model, state="unchanged")
    said = metadata.read(config.library_directory, finished.relative, descriptor, now)
    return _store(connection, config, _Reading(place, row, said, suffix), descriptor, now)


def _suffix(path: str, name: str) -> str:
    found = _SUFFIX.fullmatch(name)
    if found is None:
        known = ", ".join(f".{each}" for each in (*PLAIN, "jsonl", *SANDBOXED))
        message = f"{path}: the format is not known; known are {known}, and .gz or .zst after the first three"
        raise Problem("unknown_format", message, stage="place")
    return found[1].lower()


def _check_size(size: int, watch: Watch) -> None:
    if size > watch.file_bytes_max:
        message = f"{size} bytes: watch.file_bytes_max is {watch.file_bytes_max}; split it, or raise that and retry"
        raise Problem("too_large", message, stage="place", retryable=True)


def _digest(descriptor: int) -> str:
    digest = hashlib.sha256()
    for block in blocks(descriptor):
        digest.update(block)
    return digest.hexdigest()


def _located(reading: _Reading, descriptor: int, watch: Watch) -> Iterator[Located]:
    if reading.suffix == "jsonl":
        return content_text.read_jsonl(descriptor, watch, reading.bad)
    if reading.suffix in PLAIN:
        return PLAIN[reading.suffix](descriptor, watch)
    return sandbox.read(descriptor, reading.suffix, watch)


def _items(reading: _Reading, located: Iterator[Located]) -> Iterator[tuple[Example, Origin]]:
    for example, line in located:
        yield example, Origin(file=reading.row.path, line=line, collection=reading.place.collection)


def _store(connection: Connection, config: Config, reading: _Reading, descriptor: int, now: float) -> Outcome:
    place, row, said = reading.place, reading.row, reading.metadata
    located = _located(reading, descriptor, config.watch)
    split: Split | None = "eval" if place.area == "eval" else said.split
    is_eval = split == "eval"
    items = _items(reading, located)
    items = (
        decontaminate.remember(connection, place.model, items) if is_eval
        else decontaminate.clean(connection, place.model, items, reading.contaminated)
    )  # fmt: skip
    added = journal.add(
        connection, place.model, items, heldout_fraction=config.watch.heldout_fraction,
        split=None if split == "train" else split, now=now, kin=Kin(connection, place.model),
    )  # fmt: skip
    if signature_of(os.fstat(descriptor)) != row.signature:
        raise Moved(row.path)  # written to while it was read: nothing of it counts
    withdrawn = documents.replace(
        connection, place.model, row.path, said.id, row.sha256, added.ids, said.replaced(), now
    )
    quarantine.remove_of(connection, row.path)
    note_lines(connection, row.path, reading.bad, now)
    _note_contaminated(connection, reading, now)
    files.put(connection, row, now)
    outcome = Outcome(
        path=row.path, model=place.model, new=added.new, duplicates=added.duplicates, heldout=added.heldout,
        retracted=withdrawn, bad_lines=len(reading.bad),
    )  # fmt: skip
    counted = {"new": added.new, "duplicates": added.duplicates, "withdrawn": withdrawn}
    audit.write(connection, "file.read", row.path, {**counted, "bad_lines": len(reading.bad), "sha256": row.sha256})
    return outcome


def _note_contaminated(connection: Connection, reading: _Reading, now: float) -> None:
    if not reading.contaminated:
        return
    lines = ", ".join(str(origin.line) for _, origin in reading.contaminated[:10])
    message = (
        f"{len(reading.contaminated)} examples (at line {lines}) share 13 words in a row with"
        f" eval/{reading.place.model}/: they are not trained on. Take them out here or there"
    )
    refusal = Refusal(path=reading.row.path, code="contaminated", stage="trust", message=message)
    quarantine.add(connection, refusal, now)
