"""What starts the processes of an update, and what joins them; which pairs exist. Torch-free: the daemon asks here."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import msgspec

Executor = Literal["process", "torchrun", "horovod", "ray"]
BackendName = Literal[
    "single", "ddp", "fsdp2", "fabric-ddp", "fabric-fsdp2", "fabric-deepspeed", "deepspeed-1", "deepspeed-2",
    "deepspeed-3", "horovod",
]  # fmt: skip

JOINED_BY_TORCH: tuple[BackendName, ...] = (
    "ddp", "fsdp2", "fabric-ddp", "fabric-fsdp2", "fabric-deepspeed", "deepspeed-1", "deepspeed-2", "deepspeed-3",
)  # fmt: skip
PAIRS: dict[Executor, tuple[BackendName, ...]] = {
    "process": ("single",),
    "torchrun": JOINED_BY_TORCH,
    "horovod": ("horovod",),
    "ray": ("ddp", "fsdp2"),
}
"""The first backend of an executor is what `auto` means."""
MEETING_PLACE = re.compile(r"[^\s:,=]+:\d{1,5}")
PACKAGES: dict[str, tuple[str, str]] = {
    "fabric": ("lightning_fabric", "lightning"),
    "deepspeed": ("deepspeed", "deepspeed"),
    "horovod": ("horovod", "horovod"),
    "ray": ("ray", "ray"),
}
"""First word of an executor or a backend -> the module that it needs, and the extra that brings it."""
DIVIDED = ("fsdp2", "fabric-fsdp2", "deepspeed-3")
"""Backends that divide the base's weights, which must then be numbers of one kind."""


class Parallel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many processes train one update, and how they work together; the result is that of one process."""

    executor: Literal["process", "torchrun", "horovod", "ray"] = "process"
    """What starts them: nothing (`process`: one alone), torchrun, horovodrun, or a Ray cluster."""
    backend: Literal[
        "auto", "single", "ddp", "fsdp2", "fabric-ddp", "fabric-fsdp2", "fabric-deepspeed", "deepspeed-1",
        "deepspeed-2", "deepspeed-3", "horovod",
    ] = "auto"  # fmt: skip
    """What joins them; `auto`: `single` for one process, `horovod` for horovod, `ddp` otherwise."""
    processes: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Each gets `threads` CPU threads, or one GPU. The batch is divided among them: the result does not change."""
    machines: Annotated[int, msgspec.Meta(ge=1)] = 1
    """`torchrun` only: they share the processes evenly; on all but the daemon's own, `python -m strategies.machines
    --join STATE` is at work."""
    meet_at: str = ""
    """`HOST:PORT` of the daemon's machine, as the others reach it; for several machines."""
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    """A process that waits so long for another gives the run up."""

    @property
    def joined_by(self) -> BackendName:
        """The backend, `auto` resolved."""
        return PAIRS[self.executor][0] if self.backend == "auto" else self.backend


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver; says so without torch."""
    return Path("/dev/nvidiactl").exists()


def refusal(parallel: Parallel, device: str, gpu: bool) -> str:
    """Why this cannot be run and what to do, in one sentence; empty when it can.

    device: `auto`, `cpu` or `cuda`, as configured; gpu: whether there is one.
    """
    backend, allowed = parallel.joined_by, PAIRS[parallel.executor]
    if backend not in allowed:
        names = " or ".join(f"'{name}'" for name in allowed)
        return f"executor = '{parallel.executor}' cannot join its processes by backend = '{backend}'; take {names}"
    if parallel.executor == "process" and parallel.processes > 1:
        return f"executor = 'process' is one process, not {parallel.processes}; take executor = 'torchrun'"
    if reason := _machines_refusal(parallel):
        return reason
    if backend == "fabric-deepspeed" and (device == "cpu" or not gpu):
        return (
            "backend = 'fabric-deepspeed' runs on CUDA devices only (Lightning refuses others);"
            " take 'deepspeed-2', which is DeepSpeed itself, or a machine with a GPU"
        )
    return missing_extra(parallel)


def _machines_refusal(parallel: Parallel) -> str:
    if parallel.machines == 1:
        return ""
    if parallel.executor != "torchrun":
        return f"machines = {parallel.machines} is for executor = 'torchrun'; take that, or a cluster: executor = 'ray'"
    if parallel.processes % parallel.machines:
        return f"processes = {parallel.processes} cannot be shared by {parallel.machines} machines; take a multiple"
    if not MEETING_PLACE.fullmatch(parallel.meet_at):
        return f"meet_at = '{parallel.meet_at}' must say where {parallel.machines} machines meet; take 'HOST:PORT'"
    return ""


def four_bit_refusal(parallel: Parallel) -> str:
    """Why the base of a run cannot be in 4 bits and what to do, in one sentence; empty when it can."""
    if parallel.joined_by in DIVIDED:
        return (
            f"quantize = 'nf4' and backend = '{parallel.joined_by}' exclude each other: a base in 4 bits cannot be"
            " divided; take backend = 'ddp'"
        )
    if find_spec("bitsandbytes") is None:
        return "quantize = 'nf4' needs the package bitsandbytes, which is not installed: pip install 'eternad[qlora]'"
    return ""


def missing_extra(parallel: Parallel) -> str:
    """The command that installs what is missing for this choice; empty when nothing is."""
    for chosen in (parallel.executor, parallel.joined_by):
        words = chosen.split("-")
        for module, extra in (PACKAGES[word] for word in words if word in PACKAGES):
            if find_spec(module) is None:
                return f"'{chosen}' needs the package {module}, which is not installed: pip install 'eternad[{extra}]'"
    return ""
