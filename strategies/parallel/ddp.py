"""Data parallelism: every process holds the whole model; one sum of the adapter's flat gradient crosses the wire.

What torch's `DistributedDataParallel` does, without its wrapper: the base is frozen, so the gradient is one vector of
LoRA parameters, complete at the end of the backward pass, and one all-reduce per optimiser step is all there is to
send, however many forward passes it took.
"""

import ctypes
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.failure import Failure
from strategies.parallel.single import Single


class DataParallel(Single):
    """Processes that torchrun or Ray Train has started, joined by gloo on CPUs and NCCL on GPUs."""

    name = "ddp"

    def __init__(self, timeout_seconds: float) -> None:
        self._joined = not dist.is_initialized()
        if self._joined:
            join(timeout_seconds)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        """One all-reduce."""
        dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """A barrier made of a sum: it needs no device of its own."""
        self.sum(torch.zeros(1))

    def close(self) -> None:
        """Leave the group, if it was joined here."""
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()


PR_SET_PDEATHSIG = 1
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes."""
LOST = ("connection closed by peer", "connection reset by peer", "timed out", "timeout", "broken pipe", "socket")


class ProcessLost(Exception):
    """Another process of the run is gone, or did not answer in time."""


def is_process_lost(error: BaseException) -> bool:
    """Whether it says that another process of the run is gone or does not answer; gloo has only words for it."""
    gloo = "gloo" in str(error).lower() and any(word in str(error).lower() for word in LOST)
    return isinstance(error, dist.DistError) or gloo


def join(timeout_seconds: float) -> None:
    """Join the group that the environment describes."""
    place()
    kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(kind, timeout=timedelta(seconds=timeout_seconds))


def place() -> None:
    """Take the GPU of this process's own number, if there are any; raises `Failure` where nobody has numbered it."""
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        reason = f"several processes are configured, but {missing[0]} is not set: start the run with torchrun"
        raise Failure("not_launched", reason)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_launcher()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def die_with_launcher() -> None:
    """From now on the kernel kills this process when torchrun ends (PR_SET_PDEATHSIG, prctl(2)).

    The daemon watches torchrun, which starts its processes in sessions of their own: were it killed, they would train
    on in a run directory that the next attempt writes to.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # too late to be told
        os.kill(os.getpid(), signal.SIGKILL)
