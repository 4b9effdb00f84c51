"""Compressed content (`.gz`, `.zst`): unpacked block by block into memory, up to a cap and a ratio; one layer only."""

import os
import zlib
from collections.abc import Callable, Iterator

from daemon.config import Watch
from daemon.ingest import content_text
from daemon.ingest.opened import BLOCK, blocks
from daemon.ingest.problem import Problem
from daemon.ingest.prose import Located

RATIO_MAX = 100
"""Text shrinks to a fifth; what shrinks to a hundredth is a bomb."""
SLACK_BYTES = 1024 * 1024
"""The ratio counts from here on: short files of blanks are harmless."""

READERS: dict[str, Callable[[int, Watch], Iterator[Located]]] = {
    "txt": content_text.read_txt, "md": content_text.read_md, "jsonl": content_text.read_jsonl_strictly,
}  # fmt: skip


def unpack(descriptor: int, packing: str, bytes_max: int) -> int:
    """A descriptor of the unpacked bytes, in memory; raises `Problem` for a bomb or a broken archive."""
    target = os.memfd_create("unpacked")
    try:
        _write(target, UNPACKERS[packing](blocks(descriptor)), bytes_max, os.fstat(descriptor).st_size)
    except BaseException:
        os.close(target)
        raise
    return target


def _write(target: int, parts: Iterator[bytes], bytes_max: int, packed_bytes: int) -> None:
    unpacked = 0
    for part in parts:
        unpacked += len(part)
        if unpacked > bytes_max:
            raise Problem("too_large", f"unpacks to more than watch.file_bytes_max = {bytes_max} bytes: split the file")
        if unpacked > SLACK_BYTES + RATIO_MAX * packed_bytes:
            raise Problem("bomb", f"unpacks to more than {RATIO_MAX} times its size")
        os.write(target, part)


def _gunzip(source: Iterator[bytes]) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        for block in source:
            yield unpacker.decompress(block, BLOCK)
            while unpacker.unconsumed_tail:
                yield unpacker.decompress(unpacker.unconsumed_tail, BLOCK)
    except zlib.error as error:
        raise Problem("invalid_archive", f"not a valid gzip file: {error}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise Problem("invalid_archive", "the gzip file is cut off, or something follows its end")


def _unzstd(source: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=8 * 1024 * 1024).decompressobj()
    try:
        for block in source:
            # one input block of zeros may unpack to gigabytes at once: so the pieces that go in are tiny
            for start in range(0, len(block), 64):
                yield unpacker.decompress(block[start : start + 64])
    except zstandard.ZstdError as error:
        raise Problem("invalid_archive", f"not a valid zstandard file: {error}") from None
    if not unpacker.eof:
        raise Problem("invalid_archive", "the zstandard file is cut off")


UNPACKERS: dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]] = {"gz": _gunzip, "zst": _unzstd}
