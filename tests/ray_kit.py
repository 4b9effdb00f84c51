"""A Ray cluster of several raylets on this machine, for the tests of `make test-ray`; it has a token of its own."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAY = Path(sys.executable).parent / "ray"


class Cluster:
    """A head and as many further nodes as were added, each with so many CPUs."""

    def __init__(self, cpus: int) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")  # sockets need a short path
        token = Path(self._directory.name) / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.environment = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": self.address, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "120",
        }  # fmt: skip
        self.nodes: list[subprocess.Popen[bytes]] = []
        port = self.address.partition(":")[2]
        self._start(
            ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self._directory.name}"], cpus
        )

    def add(self, cpus: int) -> int:
        """Another node; returns its number."""
        return self._start([f"--address={self.address}"], cpus)

    def _start(self, arguments: list[str], cpus: int) -> int:
        command = [str(RAY), "start", *arguments, f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", "--block"]
        log = (Path(self._directory.name) / f"node-{len(self.nodes)}.log").open("wb")
        with log:
            node = subprocess.Popen(
                [*command, "--object-store-memory=80000000", "--disable-usage-stats"],
                env={key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)
        self._wait(len(self.nodes) - 1, Path(log.name))
        return len(self.nodes) - 1

    def _wait(self, number: int, log: Path) -> None:
        deadline = time.monotonic() + 200  # Ray itself gives a raylet 120 s
        while b"Ray runtime started" not in log.read_bytes():
            assert self.nodes[number].poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def lose(self, number: int) -> None:
        """SIGKILL to the whole node: its raylet, its workers, all that belongs to it."""
        for pid in _descendants(self.nodes[number].pid):
            _kill(pid)
        self.nodes[number].wait()

    def close(self) -> None:
        """End every node, the head last."""
        for number in reversed(range(len(self.nodes))):
            if self.nodes[number].poll() is None:
                self.lose(number)
        self._directory.cleanup()


@contextmanager
def two_raylets() -> Iterator[dict[str, str]]:
    """Two nodes with one CPU each, for a while: the environment in which they are found."""
    found = Cluster(1)
    try:
        found.add(1)
        yield found.environment
    finally:
        found.close()


def workers() -> list[int]:
    """The processes that train, by the title that Ray gives to those of its workers that hold an actor of Ray Train."""
    entries = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return sorted(int(entry.name) for entry in entries if b"RayTrainWorker" in _title(entry))


def _title(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def _descendants(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in (each for each in Path("/proc").iterdir() if each.name.isdigit()):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
