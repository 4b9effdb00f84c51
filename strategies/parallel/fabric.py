"""Lightning Fabric: the same loop on Fabric's launch, devices, collectives and wrappers (`ddp`, FSDP2).

`fabric-ddp` sums the flat gradient as `ddp` does, by Fabric's all-reduce; `fabric-fsdp2` shards the base through
Fabric's `ModelParallelStrategy`. Take the distribution `lightning-fabric`, never `lightning` (GHSA-w37p-236h-pfx3).
"""

import os
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from strategies.parallel.contract import Shared
from strategies.parallel.ddp import place
from strategies.parallel.fsdp2 import shard
from strategies.parallel.single import Single
from strategies.request import Training


class FabricParallel(Single):
    """Processes that torchrun has started, joined by Fabric."""

    def __init__(self, name: Literal["fabric-ddp", "fabric-fsdp2"], timeout_seconds: float) -> None:
        self.name, self.is_sharded = name, name == "fabric-fsdp2"
        place()
        size, here = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        timeout = timedelta(seconds=timeout_seconds)
        strategy: Any = DDPStrategy(timeout=timeout)
        if self.is_sharded:
            strategy = ModelParallelStrategy(
                lambda decoder, mesh: shard(decoder, mesh["data_parallel"]), data_parallel_size=size,
                tensor_parallel_size=1, timeout=timeout,
            )  # fmt: skip
        self._fabric = Fabric(
            accelerator="cuda" if torch.cuda.is_available() else "cpu", devices=here, num_nodes=size // here,
            strategy=strategy,
        )  # fmt: skip
        self._fabric.launch()
        self.rank, self.size = self._fabric.global_rank, self._fabric.world_size

    def setup(self, adapter: Shared) -> None:
        """FSDP2: the decoder becomes Fabric's, which shards it and is called alike."""
        super().setup(adapter)
        if self.is_sharded:
            adapter.call_layers()
            adapter.decoder = self._fabric.setup_module(adapter.decoder, move_to_device=False)

    def backward(self, loss: Tensor) -> None:
        """Fabric's."""
        self._fabric.backward(loss)

    def sum(self, tensor: Tensor) -> Tensor:
        """Fabric's all-reduce; it may work on a copy that lies on its device."""
        return tensor.copy_(self._fabric.all_reduce(tensor, reduce_op="sum"))

    def optimizer(self, training: Training) -> Optimizer:
        """AdamW, stepped by Fabric."""
        self._optimizer = self._fabric.setup_optimizers(super().optimizer(training))
        return self._optimizer

    def wait(self) -> None:
        """Fabric's barrier."""
        self._fabric.barrier()
