"""torchrun over several machines: one leads a run, the others join it.

    python -m strategies.machines RUN_DIR             # what the daemon starts, on its own machine
    python -m strategies.machines --join STATE        # on each of the others: joins one run after other, until SIGTERM

All of them see the state directory, the base model and this program at the same paths. Who leads leaves `meeting.json`
in the run's directory while it waits and works; who joins looks for it. The processes then meet as torchrun's do
anywhere (its `c10d` rendezvous), at the port that the leader opens. A machine that does not come, or goes, ends the
run of the others; the daemon tries again.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from strategies.parallel.choice import Parallel
from strategies.request import EXIT_FAILED, EXIT_TRAINED, RunReport, read_report, read_request, write

MEETING = "meeting.json"
LOOK_SECONDS, KNOCK_SECONDS = 2.0, 5.0


class Meeting(msgspec.Struct, frozen=True, kw_only=True):
    """Where the processes of a run meet."""

    run_id: str
    parallel: Parallel


def agent(meeting: Meeting, run_directory: Path, own_address: str, *, leads: bool) -> list[str]:
    """The arguments of this machine's torchrun."""
    parallel = meeting.parallel
    host = "true" if leads else "false"
    return [
        f"--nnodes={parallel.machines}", f"--nproc-per-node={parallel.processes // parallel.machines}",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={parallel.meet_at}", f"--rdzv-id={meeting.run_id}",
        f"--rdzv-conf=is_host={host},join_timeout={parallel.timeout_seconds:.0f}", f"--local-addr={own_address}",
        "-m", "strategies.train", str(run_directory),
    ]  # fmt: skip


def lead(run_directory: Path) -> int:
    """The run until its end; returns the exit code. A run that has its report is not done again."""
    report = read_report(run_directory)
    if report is None:
        request = read_request(run_directory)
        meeting = Meeting(run_id=request.run_id, parallel=request.parallel)
        write(run_directory / MEETING, meeting)
        try:
            if reason := _train(meeting, run_directory):
                report = RunReport(run_id=request.run_id, status="failed", code="cluster_lost", reason=reason)
                write(run_directory / "report.json", report)
        finally:
            (run_directory / MEETING).unlink(missing_ok=True)
        report = read_report(run_directory)
    return EXIT_TRAINED if report is not None and report.status == "trained" else EXIT_FAILED


def _train(meeting: Meeting, run_directory: Path) -> str:
    """Why the machines did not meet; empty when they did, whatever became of the run."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    parallel = meeting.parallel
    try:
        torchrun.main(agent(meeting, run_directory, parallel.meet_at.rpartition(":")[0], leads=True))
    except ChildFailedError:
        return ""  # it has said why, in its report or in the log
    except RendezvousError as error:
        return (
            f"no {parallel.machines} machines met at {parallel.meet_at} within {parallel.timeout_seconds:g} s"
            f" ({str(error) or type(error).__name__}): on each of the others"
            " `python -m strategies.machines --join STATE` must be at work"
        )
    return ""


def join(state_directory: Path, stopping: threading.Event) -> None:
    """Join the runs of a state directory one after other, until told to stop."""
    while not stopping.is_set():
        for run_directory, meeting in meetings(state_directory):
            if address := knock(meeting.parallel.meet_at):
                _follow(agent(meeting, run_directory, address, leads=False), run_directory, stopping)
        stopping.wait(LOOK_SECONDS)


def meetings(state_directory: Path) -> Iterator[tuple[Path, Meeting]]:
    """The runs that wait for machines: the newest at each address, since a leader that was killed leaves its file."""
    found: dict[str, tuple[float, Path, Meeting]] = {}
    for path in state_directory.glob(f"runs/*/{MEETING}"):
        try:
            meeting, written = msgspec.json.decode(path.read_bytes(), type=Meeting), path.stat().st_mtime
        except (OSError, msgspec.MsgspecError):
            continue  # it ended while we looked
        known = found.get(meeting.parallel.meet_at)
        if known is None or known[0] < written:
            found[meeting.parallel.meet_at] = (written, path.parent, meeting)
    for _, run_directory, meeting in found.values():
        yield run_directory, meeting


def knock(meet_at: str) -> str:
    """This machine's address as it is seen at `HOST:PORT`; empty while nobody answers there."""
    host, _, port = meet_at.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), KNOCK_SECONDS) as connection:
            return str(connection.getsockname()[0])
    except OSError:
        return ""


def _follow(arguments: list[str], run_directory: Path, stopping: threading.Event) -> None:
    """torchrun on this machine; told to stop, its processes write their part of the checkpoint and leave."""
    print(f"joining {run_directory}", flush=True)
    child = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *arguments])
    while child.poll() is None:
        if stopping.wait(LOOK_SECONDS):
            child.terminate()
            child.wait()
    print(f"left {run_directory}: status {child.returncode}", flush=True)


def main(arguments: list[str]) -> int:
    """Lead a run, or join those of a state directory; returns the exit code."""
    match arguments:
        case ["--join", state_directory]:
            stopping = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stopping.set())
            join(Path(state_directory), stopping)
            return EXIT_TRAINED
        case [run_directory]:
            return lead(Path(run_directory))
    print("usage: python -m strategies.machines RUN_DIR | --join STATE", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
