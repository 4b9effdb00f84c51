"""When the disk is the trouble: which errors mean that it is full, read-only or broken, and what is done then.

What such an error interrupted is left as it is and done again later: nothing of it counts yet, and there is nothing
wrong with the file or the run at hand. (SQLite's codes: https://www.sqlite.org/rescode.html)
"""

import errno
import sqlite3
import tempfile
from pathlib import Path
from typing import Literal

Trouble = Literal["disk_full", "read_only", "io_error", "busy", "corrupt"]

_BY_ERRNO: dict[int, Trouble] = {
    errno.ENOSPC: "disk_full", errno.EDQUOT: "disk_full", errno.EFBIG: "disk_full", errno.EROFS: "read_only",
}  # fmt: skip
_BY_CODE: dict[int, Trouble] = {
    sqlite3.SQLITE_FULL: "disk_full", sqlite3.SQLITE_READONLY: "read_only", sqlite3.SQLITE_IOERR: "io_error",
    sqlite3.SQLITE_CANTOPEN: "io_error", sqlite3.SQLITE_BUSY: "busy", sqlite3.SQLITE_LOCKED: "busy",
    sqlite3.SQLITE_CORRUPT: "corrupt", sqlite3.SQLITE_NOTADB: "corrupt",
}  # fmt: skip


def trouble_of(error: BaseException) -> Trouble | None:
    """What is wrong with the storage, None when the error is about something else."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)  # absent on errors of the module itself
        return None if code is None else _BY_CODE.get(code & 0xFF)  # the low byte is the primary code
    return _BY_ERRNO.get(error.errno or 0) if isinstance(error, OSError) else None


def is_read_only(directory: Path) -> bool:
    """Whether no file can be made there; tried, since statvfs(3) does not tell of ext4 after an error (Linux 6.18)."""
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        return error.errno == errno.EROFS
    return False
