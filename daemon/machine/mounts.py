"""Which file system a path is on: some send no events for what other machines or programs write."""

import os
from pathlib import Path

_SILENT = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "glusterfs", "lustre", "afs", "virtiofs", "vboxsf")
_MOUNTS = Path("/proc/self/mountinfo")


def file_system_of(path: Path, mountinfo: str) -> str:
    """The type of the file system that holds `path`, from the text of `/proc/self/mountinfo` (see proc(5))."""
    best, kind = "", ""
    name = os.path.realpath(path)
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].encode().decode("unicode_escape")  # a blank is written \\040
        inside = name == point or name.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # later lines lie over earlier ones
            best, kind = point, right.split(" ")[0]
    return kind


def sends_no_events(path: Path) -> bool:
    """Whether `path` must be polled."""
    try:
        mountinfo = _MOUNTS.read_text("utf-8", "surrogateescape")
    except OSError:
        return False
    return file_system_of(path, mountinfo).startswith(_SILENT)
