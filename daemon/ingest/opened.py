"""Opening what strangers drop: no link is followed, no FIFO waited for, and what was opened is what was seen."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon.drop_names import printable
from daemon.ingest.problem import Moved, Problem
from daemon.state.files import Finished, Signature

BLOCK = 256 * 1024
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def signature_of(status: os.stat_result) -> Signature:
    """The part of a stat that changes when the content does."""
    return Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def opened(library: Path, finished: Finished) -> Iterator[int]:
    """A descriptor of a regular file, walked to from the library directory without following any link.

    Raises `Moved` when it is gone or another file by now, `Problem` when it may not be read.
    """
    descriptor = open_below(library, finished.relative)
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != (finished.signature.dev, finished.signature.ino):
            raise Moved(finished.path)
        yield descriptor
    finally:
        os.close(descriptor)


def open_below(library: Path, relative: str) -> int:
    """A descriptor of a regular file; no part of its path may be a link. Raises `Moved` or `Problem`."""
    *directories, name = relative.split("/")
    at = os.open(library, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for directory in directories:
            below = os.open(directory, _FLAGS | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        descriptor = os.open(name, _FLAGS, dir_fd=at)
    except PermissionError as error:
        message = f"{printable(relative)}: {error.strerror}: let the daemon's user read it, then retry"
        raise Problem("unreadable", message, stage="read", retryable=True) from None
    except OSError:  # gone, or replaced by a link, a socket, a directory
        raise Moved(relative) from None
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Moved(relative)
    return descriptor


def blocks(descriptor: int, start: int = 0, length: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from `start` (at most `length`), block by block."""
    end = None if length is None else start + length
    while end is None or start < end:
        block = os.pread(descriptor, BLOCK if end is None else min(BLOCK, end - start), start)
        if not block:
            return
        yield block
        start += len(block)


def next_data(descriptor: int, position: int) -> int:
    """The first byte at or after `position` that is not in a hole of a sparse file; the end if there is none."""
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError:  # ENXIO: a hole up to the end; EINVAL: no support, and then nothing is skipped
        size = os.fstat(descriptor).st_size
        return size if _has_holes(descriptor) else min(position, size)


def _has_holes(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return status.st_blocks * 512 < status.st_size
