"""Does several runs one after other in the processes that torchrun has started: `parallel_cells.py RUN...`.

Starting Python and its libraries takes longer than a run on a tiny model.
"""

import sys
from pathlib import Path

import torch.distributed as dist

from strategies import train
from strategies.parallel.ddp import join

if __name__ == "__main__":
    join(60)
    for directory in sys.argv[1:]:
        train.main(Path(directory))
        dist.barrier()
