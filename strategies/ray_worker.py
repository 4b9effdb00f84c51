"""One worker of a run on a Ray cluster: joins the others, then does what a process of torchrun does."""

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from strategies.request import read_report

STOP_SECONDS = 1.0
"""How often a worker looks whether the run has been told to stop."""


def work(given: dict[str, Any]) -> None:
    """The whole of `strategies.train`; a worker that has lost another raises, and Ray starts the group again."""
    # before the group is joined: Avalanche makes a logger when it is imported, and refuses to in a second process
    from strategies import train
    from strategies.pulse import Interrupted, Pulse

    run_directory = Path(given["run_directory"])
    if read_report(run_directory) is not None:
        return  # it was done, and lost only afterwards
    describe_group()
    pulse = Pulse(run_directory)
    threading.Thread(target=_watch_for_stop, args=(run_directory, pulse), daemon=True).start()
    try:
        report = train.attempt(run_directory, pulse)
    except Interrupted:
        return
    train.conclude(run_directory, pulse, report)


def describe_group() -> None:
    """The environment that torchrun would set; the first worker says where the group meets."""
    from ray import train
    from ray.train import collective

    context = train.get_context()
    rank = context.get_world_rank()
    address, port = collective.broadcast_from_rank_zero(_meeting_place() if rank == 0 else None)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(context.get_world_size()), "LOCAL_RANK": str(context.get_local_rank()),
        "MASTER_ADDR": address, "MASTER_PORT": str(port),
    }  # fmt: skip


def _meeting_place() -> tuple[str, int]:
    import ray

    address = ray.util.get_node_ip_address()
    with socket.socket() as free:
        free.bind((address, 0))
        return address, free.getsockname()[1]


def _watch_for_stop(run_directory: Path, pulse: Any) -> None:
    """Signals do not reach a worker on another machine; a file in the run directory does."""
    while not (run_directory / "stop").exists():
        time.sleep(STOP_SECONDS)
    pulse.is_told_to_stop = True
