"""Horovod (Sergeev & Del Balso, arXiv:1802.05799): the sums of `ddp`, over the processes that horovodrun has started.

A legacy engine: unmaintained since 2023, kept for clusters that have it. `docs/scale.md` says how to build it.
"""

import os

import torch
from torch import Tensor

os.environ.setdefault("HOROVOD_LOG_LEVEL", "error")

from strategies.failure import Failure
from strategies.parallel.ddp import ProcessLost
from strategies.parallel.single import Single


class HorovodParallel(Single):
    """Processes that horovodrun has started, joined by its own ring."""

    name = "horovod"

    def __init__(self) -> None:
        import horovod.torch as hvd
        from horovod.common.exceptions import HorovodInternalError

        self._hvd, self._lost = hvd, HorovodInternalError
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        if self.size == 1 and "HOROVOD_SIZE" not in os.environ:
            raise Failure("not_launched", "several processes are configured: start the run with horovodrun")
        if torch.cuda.is_available():
            torch.cuda.set_device(hvd.local_rank())

    def sum(self, tensor: Tensor) -> Tensor:
        """One all-reduce. Raises `ProcessLost` when a process is gone."""
        try:
            self._hvd.allreduce_(tensor, op=self._hvd.Sum)
        except self._lost as error:
            raise ProcessLost(str(error)) from error
        return tensor

    def wait(self) -> None:
        """A barrier made of a sum."""
        self.sum(torch.zeros(1))

    def close(self) -> None:
        """Leave the ring."""
        self._hvd.shutdown()
