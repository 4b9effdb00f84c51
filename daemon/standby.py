"""A trainer that waits for its run with everything loaded (`strategies.warm`): updates at short intervals begin sooner.

It is the process that the next run would have started anyway, started early: it trains one run, and whoever kills it
kills that run alone. The run's lock goes to it over a socket, so that it lives as long as the trainer does.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from daemon.config import Model
from strategies.request import Wanted

MODULE = "strategies.warm"
COMMAND = [sys.executable, "-m", MODULE]
MEMORY_SHARE_MIN = 0.1
"""Of the machine's memory: with less of it available nothing is held for later."""


def environment() -> dict[str, str]:
    """Of every trainer."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


def wanted_of(model: Model) -> Wanted | None:
    """What to load ahead for a model; None where its updates need no standby, or are made by several processes."""
    if not model.warm_seconds or model.parallel.executor != "process":
        return None
    return Wanted(
        base_path=model.base_path, precision=model.training.precision, device=model.device,
        quantize=model.training.quantize, threads=model.threads,
    )  # fmt: skip


class Standby:
    """One waiting process."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self.since = wanted, time.monotonic()
        self._channel, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [*COMMAND, wanted.text()],
                stdin=its.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether it still waits, or loads."""
        return self._process.poll() is None

    def take(self, run_directory: Path, log: IO[bytes], *locks: int) -> subprocess.Popen[bytes] | None:
        """Give it the run, its log and its locks; None where it is gone. Whoever loads still takes it afterwards."""
        try:
            socket.send_fds(self._channel, [os.fsencode(run_directory)], [log.fileno(), *locks])
        except OSError:
            self.dismiss()
            return None
        self._channel.close()
        return self._process

    def dismiss(self) -> None:
        """End it."""
        self._channel.close()
        self._process.kill()
        self._process.wait()


class Standbys:
    """At most one for each model that wants one."""

    def __init__(self) -> None:
        self._waiting: dict[str, Standby] = {}

    def prepare(self, name: str, model: Model) -> None:
        """A run of this model has ended: the next one may be near."""
        wanted = wanted_of(model)
        if wanted is not None and name not in self._waiting and memory_share() >= MEMORY_SHARE_MIN:
            self._waiting[name] = Standby(wanted)

    def take(self, name: str, model: Model) -> Standby | None:
        """The one that waits for a run of this model, if it has loaded what the run needs."""
        found = self._waiting.pop(name, None)
        if found is not None and found.wanted != wanted_of(model):
            found.dismiss()
            return None
        return found

    def look_after(self, models: dict[str, Model]) -> None:
        """Dismiss those that waited too long, are not wanted any more, or hold memory that is scarce."""
        scarce = bool(self._waiting) and memory_share() < MEMORY_SHARE_MIN
        for name, standby in list(self._waiting.items()):
            model = models.get(name)
            is_wanted = model is not None and standby.wanted == wanted_of(model)
            is_late = model is not None and time.monotonic() - standby.since > model.warm_seconds
            if scarce or is_late or not is_wanted or not standby.is_alive():
                self._waiting.pop(name).dismiss()

    def close(self) -> None:
        """The daemon ends."""
        for standby in self._waiting.values():
            standby.dismiss()
        self._waiting.clear()


def memory_share() -> float:
    """Of the machine's memory, what could be had without swapping (MemAvailable, proc_meminfo(5))."""
    kib = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    return kib["MemAvailable"] / kib["MemTotal"]
