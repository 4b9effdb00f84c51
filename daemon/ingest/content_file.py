"""Content files: `.txt`, `.md` and `.jsonl` become examples, the whole file in one transaction."""

import hashlib
import os
from collections.abc import Callable, Iterator

from buffers import journal
from buffers.example import Origin
from daemon.config import Config, Watch
from daemon.ingest import markdown, prose, rows, strict_json, text
from daemon.ingest.lines import read_lines
from daemon.ingest.opened import blocks, signature_of
from daemon.ingest.outcome import Outcome
from daemon.ingest.place import Place
from daemon.ingest.problem import Moved, Problem
from daemon.ingest.prose import Block, Located
from daemon.ingest.refuse import BadLine, note_lines
from daemon.state import audit, files, quarantine
from daemon.state.database import Connection, transaction
from daemon.state.files import FileRow, Finished

Reader = Callable[[int, Watch, list[BadLine]], Iterator[Located]]


def read_content(
    connection: Connection, config: Config, finished: Finished, place: Place, descriptor: int, now: float
) -> Outcome:
    """Take in one content file; the same bytes as before are only noted. Raises `Problem` for a file that is bad."""
    read = _READERS.get(place.name.rpartition(".")[2].lower())
    if read is None:
        known = ", ".join(f".{suffix}" for suffix in _READERS)
        raise Problem("unknown_format", f"{finished.path}: the format is not known; known are {known}", stage="place")
    signature = signature_of(os.fstat(descriptor))
    if signature.size > config.watch.file_bytes_max:
        raise Problem(
            "too_large", f"{signature.size} bytes: watch.file_bytes_max is {config.watch.file_bytes_max}; split the"
            " file, or raise the limit and retry", stage="place", retryable=True,
        )  # fmt: skip
    digest = _digest(descriptor)
    row = FileRow(path=finished.path, signature=signature, sha256=digest)
    before = files.get(connection, finished.path)
    if before is not None and before.sha256 == digest:
        with transaction(connection):
            files.put(connection, row, now)
        return Outcome(path=finished.path, model=place.model, state="unchanged")
    return _store(connection, config, place, row, read, descriptor, now)


def _digest(descriptor: int) -> str:
    digest = hashlib.sha256()
    for block in blocks(descriptor):
        digest.update(block)
    return digest.hexdigest()


def _store(
    connection: Connection, config: Config, place: Place, row: FileRow, read: Reader, descriptor: int, now: float
) -> Outcome:
    bad: list[BadLine] = []
    items = (
        (example, Origin(file=row.path, line=line, collection=place.collection))
        for example, line in read(descriptor, config.watch, bad)
    )
    with transaction(connection):
        added = journal.add(
            connection, place.model, items, heldout_fraction=config.watch.heldout_fraction,
            split="eval" if place.area == "eval" else None, now=now,
        )  # fmt: skip
        if signature_of(os.fstat(descriptor)) != row.signature:
            raise Moved(row.path)  # written to while it was read: nothing of it counts
        quarantine.remove_of(connection, row.path)
        note_lines(connection, row.path, bad, now)
        files.put(connection, row, now)
        counted = {"new": added.new, "duplicates": added.duplicates, "heldout": added.heldout, "bad_lines": len(bad)}
        audit.write(connection, "file.read", row.path, {**counted, "sha256": row.sha256})
    return Outcome(
        path=row.path, model=place.model, new=added.new, duplicates=added.duplicates, heldout=added.heldout,
        bad_lines=len(bad),
    )  # fmt: skip


def _txt(descriptor: int, watch: Watch, _bad: list[BadLine]) -> Iterator[Located]:
    text.check(descriptor)
    blocks = (
        Block("rule" if prose.is_rule(paragraph) else "text", paragraph, line)
        for paragraph, line in text.read_paragraphs(descriptor, 64 * watch.chunk_characters)
    )
    return prose.examples(blocks, watch.chunk_characters)


def _md(descriptor: int, watch: Watch, _bad: list[BadLine]) -> Iterator[Located]:
    size = os.fstat(descriptor).st_size
    if size > markdown.BYTES_MAX:
        raise Problem(
            "too_large", f"{size} bytes of Markdown: at most {markdown.BYTES_MAX} are parsed at once; split the file"
        )
    text.check(descriptor)
    whole = text.read_all(descriptor)
    _, body, lines = markdown.split_front_matter(whole)
    return prose.examples(markdown.blocks(body, lines + 1), watch.chunk_characters)


def _jsonl(descriptor: int, watch: Watch, bad: list[BadLine]) -> Iterator[Located]:
    text.check_magic(next(blocks(descriptor), b""))
    for line in read_lines(descriptor, line_bytes_max=watch.line_bytes_max, open_end=True):
        try:
            if line.body is None:
                raise Problem("line_too_long", f"longer than watch.line_bytes_max = {watch.line_bytes_max}; skipped")
            body = line.body.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else line.body
            if body.strip():
                yield rows.example_of(strict_json.parse(body)), line.number
        except Problem as problem:
            bad.append(BadLine(line, problem))


_READERS: dict[str, Reader] = {"txt": _txt, "md": _md, "jsonl": _jsonl}
