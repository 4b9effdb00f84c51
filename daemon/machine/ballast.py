"""64 MiB that are kept occupied, to be given up when the disk is full: room for the rows that make more room.

Removing an old version begins with a row that says so, and a row needs space: without a reserve a full disk could not
even be cleaned up.
"""

import errno
import os
import shutil
from pathlib import Path

BYTES = 64 * 2**20


class Ballast:
    """`STATE/ballast`. `floor`: the free space that the configuration asks for; without one nothing is reserved."""

    def __init__(self, path: Path, floor: float) -> None:
        self.path, self._floor = path, floor
        self.released_total = 0

    @property
    def size(self) -> int:
        """Bytes that are kept: never more than the floor."""
        return int(min(BYTES, self._floor))

    def keep(self) -> bool:
        """Occupy the space if it is not yet and the disk has room for it twice above the floor; whether it is now."""
        if self.path.exists() or not self.size:
            return self.path.exists()
        if shutil.disk_usage(self.path.parent).free < self._floor + 2 * self.size:
            return False
        try:
            self._occupy()
        except OSError as error:
            self.path.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
                raise
            return False
        return True

    def release(self) -> int:
        """Give the space up; returns how many bytes that freed."""
        try:
            freed = self.path.stat().st_size
            self.path.unlink()
        except OSError:  # not there, or the file system is read-only
            return 0
        self.released_total += 1
        return freed

    def _occupy(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self.size)  # real blocks, not a hole
        finally:
            os.close(descriptor)
