"""Fully sharded data parallelism (Zhao et al., arXiv:2304.11277), torch's second form: `fully_shard`.

Each process keeps 1/P of every decoder layer's frozen weights; a layer is gathered when it is called, forward and
backward, and let go afterwards. The adapter, the embedding, the last norm and the output layer stay whole everywhere:
the first is what is trained, the others are read outside of the layers. Of an 8B model in bfloat16 that is 14 GiB
divided and 2 GiB kept.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from strategies.failure import Failure
from strategies.parallel.contract import Shared
from strategies.parallel.ddp import DataParallel


class FullyShardedParallel(DataParallel):
    """The base is divided; the adapter's gradient is summed as in `DataParallel`."""

    name = "fsdp2"
    is_sharded = True

    def setup(self, adapter: Shared) -> None:
        """Keep this process's share of the base, let go of the rest."""
        super().setup(adapter)
        adapter.call_layers()
        shard(adapter.decoder, init_device_mesh(adapter.flat.device.type, (self.size,)))


def shard(decoder: Any, mesh: DeviceMesh) -> Any:
    """Divide the frozen weights of the decoder's layers among the processes of `mesh`; the decoder itself comes back.

    The decoder becomes the root, which ends a backward pass for all its layers, but owns no weight.
    """
    layers = layers_of(decoder)
    frozen = {weight for layer in layers for name, weight in layer.named_parameters() if "lora_" not in name}
    whole = set(decoder.parameters()) - frozen
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    return decoder


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers: its list of modules that holds the most weights."""
    lists = [list(child) for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise Failure("bad_parallel", f"{type(decoder).__name__} has no list of layers to shard; take backend = 'ddp'")
    return max(lists, key=lambda found: sum(weight.numel() for layer in found for weight in layer.parameters()))
