"""What a writer says about a content file: YAML front matter of a `.md`, or a sidecar `NAME.meta.json` beside it."""

import os
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from daemon.ingest import strict_json
from daemon.ingest.opened import open_below
from daemon.ingest.problem import Moved, Problem
from daemon.ingest.text import Utf8

BYTES_MAX = 64 * 1024
DocumentId = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """Keys that mean something; others are allowed and mean nothing."""

    id: DocumentId | None = None
    """Names the document: new bytes under it are a new version, and what only the old one held is withdrawn."""
    title: str = ""
    lang: str = ""
    license: str = ""
    valid_from: str | None = None
    valid_until: str | None = None
    """ISO 8601; UTC unless it says otherwise."""
    supersedes: list[DocumentId] | DocumentId = []
    """Ids of documents that this one replaces."""
    split: Literal["train", "heldout", "eval"] | None = None
    """Where its examples belong; by default they are trained on, with a hold-out."""

    def replaced(self) -> list[str]:
        """Every id whose documents give way to this one."""
        others = [self.supersedes] if isinstance(self.supersedes, str) else self.supersedes
        return ([self.id] if self.id else []) + others


def read(library: Path, relative: str, descriptor: int, now: float) -> Metadata:
    """The metadata of an open content file; raises `Problem` when it is broken, or says that it is not the time."""
    found = _front_matter(descriptor) if relative.endswith(".md") else {}
    found |= _sidecar(library, f"{relative}.meta.json")
    found = {key: value.isoformat() if isinstance(value, date) else value for key, value in found.items()}
    try:
        metadata = msgspec.convert(found, Metadata, strict=True)
    except msgspec.ValidationError as error:
        raise Problem("bad_metadata", f"metadata: {error}") from None
    _check_time(metadata, now)
    return metadata


def _check_time(metadata: Metadata, now: float) -> None:
    first, last = _seconds(metadata.valid_from), _seconds(metadata.valid_until)
    if first is not None and now < first:
        message = f"valid_from = {metadata.valid_from}: not before then; retry later"
        raise Problem("not_yet_valid", message, stage="place", retryable=True)
    if last is not None and now >= last:
        raise Problem("expired", f"valid_until = {metadata.valid_until}: it is over", stage="place")


def _seconds(moment: str | None) -> float | None:
    if moment is None:
        return None
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        raise Problem("bad_metadata", f"metadata: {moment[:64]!r} is no date: write 2026-11-22") from None
    return parsed.replace(tzinfo=parsed.tzinfo or UTC).timestamp()


def _front_matter(descriptor: int) -> dict[str, Any]:
    from daemon.ingest.markdown import split_front_matter

    head = os.pread(descriptor, BYTES_MAX, 0)
    if not head.removeprefix(b"\xef\xbb\xbf").startswith(b"---"):
        return {}
    return split_front_matter(Utf8().decode(head).replace("\r\n", "\n"))[0]


def _sidecar(library: Path, relative: str) -> dict[str, Any]:
    try:
        descriptor = open_below(library, relative)
    except Moved:  # there is none
        return {}
    try:
        data = os.read(descriptor, BYTES_MAX + 1)
        tree = strict_json.parse(data)
    except Problem as problem:
        raise Problem("bad_metadata", f"{Path(relative).name}: {problem.message}") from None
    finally:
        os.close(descriptor)
    if len(data) > BYTES_MAX or not isinstance(tree, dict):
        raise Problem("bad_metadata", f"{Path(relative).name} must be one JSON object of at most {BYTES_MAX} bytes")
    return tree
