"""A trainer that has everything loaded before there is a run: `python -m strategies.warm WANTED`, stdin a socket.

Torch, transformers and the base are loaded ahead. Then one run is waited for, and this process becomes its trainer: the
code, signals and exit codes of `python -m strategies.train RUN_DIR`, and its result bit for bit, since nothing is done
with what is loaded. One run, then it ends: a crash takes nothing else with it. On a GPU only the libraries are loaded
ahead: its memory belongs to whoever trains.

The socket (SOCK_SEQPACKET) brings one message: the run directory, with descriptors for the log and for the locks that
shall be held as long as this process lives. Its end without a message means: leave.
"""

import contextlib
import os
import socket
import sys
from pathlib import Path

from strategies import train
from strategies.base_model import load_ahead
from strategies.failure import Failure
from strategies.request import Wanted

LONGEST, DESCRIPTORS = 65536, 16
"""Bytes of a path; descriptors of one message."""


def wait_for_run(channel: socket.socket) -> Path | None:
    """The directory to work in; its log takes over stdout and stderr. None when nobody will ask any more."""
    message, descriptors, _, _ = socket.recv_fds(channel, LONGEST, DESCRIPTORS)
    if not message:
        return None
    for stream in (1, 2):
        os.dup2(descriptors[0], stream)
    return Path(os.fsdecode(message))


def main(wanted: Wanted) -> int:
    """Load, wait, train; returns the exit code of the run, or 0 where there was none."""
    channel = socket.socket(fileno=os.dup(0))
    with contextlib.suppress(Failure):  # the run says what is wrong with the base
        load_ahead(wanted)
    run_directory = wait_for_run(channel)
    return 0 if run_directory is None else train.main(run_directory)


if __name__ == "__main__":
    train.leave(main(Wanted.read(sys.argv[1])))
