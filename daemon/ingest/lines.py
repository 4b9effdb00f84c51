r"""Lines of a file of any size in bounded memory: split at the byte `\n` alone, as JSON lines are defined.

`str.splitlines` would also split at U+2028, U+0085 or a form feed, all legal inside a JSON string.
"""

import os
from collections.abc import Iterator

import msgspec

from daemon.ingest.opened import BLOCK, next_data


class Line(msgspec.Struct, frozen=True, gc=False):
    r"""One complete line."""

    number: int
    """1-based."""
    offset: int
    """Of its first byte."""
    end: int
    r"""Of the byte after its `\n`."""
    body: bytes | None
    """Without the line end; None when it is longer than allowed and was skipped."""


def read_lines(
    descriptor: int, offset: int = 0, number: int = 1, *, line_bytes_max: int, open_end: bool = False
) -> Iterator[Line]:
    r"""Complete lines from `offset` on, the first of which is line `number`.

    What follows the last `\n` is not a line yet; with `open_end` (a file that is finished) it is.
    """
    held, start, position, skipping = bytearray(), offset, offset, False
    while True:
        if skipping:
            position = max(position, next_data(descriptor, position))
        block = os.pread(descriptor, BLOCK, position)
        if not block:
            break
        begin = 0
        while (end := block.find(b"\n", begin)) >= 0:
            held += block[begin:end]
            too_long = skipping or len(held) > line_bytes_max
            yield Line(number, start, position + end + 1, None if too_long else bytes(held).removesuffix(b"\r"))
            held.clear()
            begin, start, number, skipping = end + 1, position + end + 1, number + 1, False
        if not skipping:
            held += block[begin:]
        if len(held) > line_bytes_max:
            held.clear()
            skipping = True
        position += len(block)
    if open_end and position > start:
        too_long = skipping or len(held) > line_bytes_max
        yield Line(number, start, position, None if too_long else bytes(held).removesuffix(b"\r"))
