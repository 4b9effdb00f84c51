"""The command of an update, by its executor. Torch-free: the daemon starts it and watches one process, whatever is
behind it."""

import sys
from pathlib import Path

from strategies.parallel.choice import Parallel

ALONE, ON_RAY, ON_MACHINES = "strategies.train", "strategies.ray_train", "strategies.machines"
MODULES = (ALONE, ON_RAY, ON_MACHINES)
"""A command ends with one of these and the run directory: so it is found again in the table of processes."""


def command(parallel: Parallel, run_directory: Path) -> list[str]:
    """What to start on this machine; it leaves `report.json` and ends when all of its processes have."""
    many = str(parallel.processes)
    each = ["-m", ALONE, str(run_directory)]
    match parallel.executor:
        case "process":
            return [sys.executable, *each]
        case "torchrun" if parallel.machines > 1:
            return [sys.executable, "-m", ON_MACHINES, str(run_directory)]
        case "torchrun":
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={many}"]
            return [*launcher, *each]
        case "horovod":
            launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", many, "-H", f"localhost:{many}"]
            return [*launcher, sys.executable, *each]
        case "ray":
            return [sys.executable, "-m", ON_RAY, str(run_directory)]
