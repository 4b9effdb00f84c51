"""Parses hostile files in a unit of their own, `eternad-parse@.service`: for daemons whose own sandbox has a GPU or a
network, which a child of theirs would have, too.

The daemon connects to the unit's socket and sends the task and the open file (SCM_RIGHTS, unix(7)); systemd starts one
process per connection, with a user that exists only as long; that becomes the same parser as the plain child is.
"""

import os
import shutil
import socket
import sys
from pathlib import Path

SOCKET = Path("/run/eternad-parse.sock")
TASK_BYTES_MAX = 64 * 1024


def in_unit(descriptor: int, task: str, answer: int, *, seconds: float, path: Path = SOCKET) -> str:
    """Have the file `descriptor` parsed and what the parser says written to `answer`; how it broke, or "".

    A parser that dies in mid-answer is no error here: its last line is missing, which the caller looks for.
    """
    try:
        with socket.socket(socket.AF_UNIX) as parser:
            parser.settimeout(seconds)
            parser.connect(str(path))
            socket.send_fds(parser, [task.encode()], [descriptor])
            parser.shutdown(socket.SHUT_WR)
            with parser.makefile("rb") as said, os.fdopen(os.dup(answer), "wb") as file:
                shutil.copyfileobj(said, file)
    except TimeoutError:
        return f"took longer than {seconds:g} s"
    except OSError as error:
        return f"could not be reached at {path}: {error.strerror}"
    return ""


def main() -> None:
    """The unit's program: the connection is standard input and output; become the parser of the file that it brings."""
    with socket.socket(fileno=os.dup(0)) as daemon:
        task, descriptors, _, _ = socket.recv_fds(daemon, TASK_BYTES_MAX, 1)
    if not descriptors:
        sys.exit("no file came with the task")
    os.lseek(descriptors[0], 0, os.SEEK_SET)
    os.dup2(descriptors[0], 0)
    os.execv(sys.executable, [sys.executable, "-m", "daemon.ingest.child", task.decode()])


if __name__ == "__main__":
    main()
