"""The backend of a run, by its name in the configuration; an engine's packages are imported only where it is chosen."""

import torch

from strategies.failure import Failure
from strategies.parallel.choice import Parallel, refusal
from strategies.parallel.contract import Backend
from strategies.parallel.ddp import DataParallel
from strategies.parallel.single import Single


def open_backend(parallel: Parallel, device: str) -> Backend:
    """Join the other processes; raises `Failure` before any work for what cannot be done here."""
    if reason := refusal(parallel, device, torch.cuda.is_available()):
        raise Failure("bad_parallel", reason)
    match parallel.joined_by:
        case "single":
            backend: Backend = Single()
        case "ddp":
            backend = DataParallel(parallel.timeout_seconds)
        case "fsdp2":
            from strategies.parallel.fsdp2 import FullyShardedParallel

            backend = FullyShardedParallel(parallel.timeout_seconds)
        case "fabric-ddp" | "fabric-fsdp2" as name:
            from strategies.parallel.fabric import FabricParallel

            backend = FabricParallel(name, parallel.timeout_seconds)
        case "deepspeed-1" | "deepspeed-2" | "deepspeed-3" as name:
            from strategies.parallel.zero import ZeroParallel

            backend = ZeroParallel(int(name[-1]), parallel.timeout_seconds)
        case "horovod":
            from strategies.parallel.horovod import HorovodParallel

            backend = HorovodParallel()
        case "fabric-deepspeed":
            from strategies.parallel.zero import FabricZeroParallel

            backend = FabricZeroParallel(parallel.timeout_seconds)
    if parallel.executor != "ray" and backend.size != parallel.processes:
        found, wanted = backend.size, parallel.processes
        backend.close()
        raise Failure("bad_parallel", f"{found} processes were started, the configuration names {wanted}")
    return backend
