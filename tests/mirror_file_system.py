"""A file system that shows a directory at another place and can be turned read-only while files of it are written.

    mirror_file_system.py DIRECTORY MOUNT SWITCH

While the file SWITCH exists, the kernel hears EROFS on whatever would change something, also through descriptors that
were open before. A mount of the kernel's own cannot do that and come back: `mount -o remount,ro` refuses while a file
is open for writing, and after an error ext4 stays read-only until it is unmounted. FUSE; in the foreground, until then.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import mfusepy

FOUND = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_blocks", "st_ino")
TIMES = ("st_atime", "st_mtime", "st_ctime")
SPACE = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_namemax")


class Mirror(mfusepy.Operations):
    """Every operation on the same path below another directory. Names and arguments are the library's."""

    use_ns = True

    def __init__(self, root: str, switch: Path) -> None:
        self._root, self._switch = root, switch

    def _here(self, path: str) -> str:
        return self._root + path

    def _change(self, path: str = "") -> str:
        """The path of what is about to be changed."""
        if self._switch.exists():
            raise mfusepy.FuseOSError(errno.EROFS)
        return self._root + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.fstat(fh) if fh is not None else os.lstat(self._here(path))
        return {name: getattr(found, name) for name in FOUND} | {name: getattr(found, f"{name}_ns") for name in TIMES}

    def readdir(self, path: str, _fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._here(path))]

    def readlink(self, path: str) -> str:
        return os.readlink(self._here(path))

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._here(path))
        return {name: getattr(found, name) for name in SPACE}

    def open(self, path: str, flags: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            self._change()
        return os.open(self._here(path), flags & (os.O_ACCMODE | os.O_APPEND | os.O_TRUNC))

    def create(self, path: str, mode: int, _fi: Any = None) -> int:
        return os.open(self._change(path), os.O_RDWR | os.O_CREAT, mode)

    def read(self, _path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, _path: str, data: bytes, offset: int, fh: int) -> int:
        self._change()
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._change(path) if fh is None else fh, length)

    def fsync(self, _path: str, _datasync: int, fh: int) -> int:
        self._change()
        os.fsync(fh)
        return 0

    def release(self, _path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(self._change(path), ns=times, follow_symlinks=False)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._change(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self._change(path), uid, gid, follow_symlinks=False)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._change(path), mode)

    def mknod(self, path: str, mode: int, dev: int) -> None:
        os.mknod(self._change(path), mode, dev)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._change(old), self._here(new))

    def rmdir(self, path: str) -> None:
        os.rmdir(self._change(path))

    def symlink(self, target: str, source: str) -> None:
        os.symlink(source, self._change(target))

    def unlink(self, path: str) -> None:
        os.unlink(self._change(path))


if __name__ == "__main__":
    directory, mount, switch = sys.argv[1:]
    mfusepy.FUSE(Mirror(directory, Path(switch)), mount, foreground=True, nothreads=True)
