"""DeepSpeed's ZeRO (Rajbhandari et al., arXiv:1910.02054): stages 1 and 2 divide AdamW's state, stage 3 the base too.

The gradient of a step is complete before DeepSpeed sees it: summed over the processes, and changed by the methods that
pull or project it. It is handed over as the loss <theta, g>, whose gradient with respect to theta is exactly g; so
DeepSpeed reduces, divides and steps as for any model, and no stage's way of accumulating gradients matters.
Stage 2 therefore saves nothing over stage 1 here: the gradient of an adapter is small, and the methods need it whole.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # or it probes for compilers

import deepspeed
import deepspeed.ops
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from strategies.parallel.contract import Shared
from strategies.parallel.ddp import DataParallel
from strategies.parallel.fsdp2 import layers_of
from strategies.parallel.single import MOMENTS
from strategies.request import Training

# a kernel that would be compiled at the first all-reduce; gloo does without
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Divided(nn.Module):
    """What DeepSpeed divides: theta, and the layers that it is given."""

    def __init__(self, theta: Tensor, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())
        self.layers = nn.ModuleList(layers)

    def forward(self, gradient: Tensor) -> Tensor:
        """<theta, g>"""
        return torch.dot(self.theta, gradient)


class ZeroParallel(DataParallel):
    """The adapter's optimiser is DeepSpeed's; at stage 3 so are the base's layers."""

    def __init__(self, stage: int, timeout_seconds: float) -> None:
        super().__init__(timeout_seconds)
        self.name, self.is_sharded, self._stage = f"deepspeed-{stage}", stage == 3, stage
        self._engine: Any = None

    def setup(self, adapter: Shared) -> None:
        """Divide the base before its first forward pass; rates are set when training begins."""
        super().setup(adapter)
        layers: list[nn.Module] = []
        if self.is_sharded:
            adapter.call_layers()
            layers = layers_of(adapter.decoder)
        with without_lora(layers):
            self._divided = Divided(adapter.flat, layers)
            self._engine = self._initialise(AdamW([self._divided.theta]))

    def _initialise(self, optimizer: AdamW) -> Any:
        return deepspeed.initialize(model=self._divided, optimizer=optimizer, config=settings(self._stage))[0]

    def optimizer(self, training: Training) -> Optimizer:
        """DeepSpeed's, which holds this process's part of the moments; made anew with every loop, so emptied here."""
        group = self._engine.optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = training.learning_rate, training.weight_decay
        self._optimizer = self._engine.optimizer
        return self._optimizer

    def step(self) -> None:
        """theta <- flat (others may have changed it), one step on <theta, g>, flat <- theta."""
        adapter, theta = self._adapter, self._divided.theta
        safe_set_full_fp32_param(theta, adapter.flat)
        self._engine.backward(self._engine(adapter.gradient.clone()))
        with without_lora(self._divided.layers):  # it lets go of every weight that it finds
            self._engine.step()
        with torch.no_grad():
            adapter.flat.copy_(safe_get_full_fp32_param(theta))

    def moments(self) -> dict[str, Tensor]:
        """Gathered from all processes."""
        count = self._count()
        if count is None:
            return {}
        theta = self._divided.theta
        found = {key: safe_get_full_optimizer_state(theta, key).reshape(-1) for key in MOMENTS[:2]}
        return {**found, "step": torch.as_tensor(count).clone()}

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Each process takes its part."""
        theta = self._divided.theta
        for key in MOMENTS[:2]:
            safe_set_full_optimizer_state(theta, tensors[key].to(theta.device), key)
        for state in self._inner().values():
            state["step"] = tensors["step"].clone()

    def _inner(self) -> dict[Any, dict[str, Any]]:
        """The state of the AdamW inside DeepSpeed's optimiser."""
        return self._engine.optimizer.optimizer.state

    def _count(self) -> Tensor | None:
        return next((state["step"] for state in self._inner().values() if "step" in state), None)


class FabricZeroParallel(ZeroParallel):
    """Stage 2 through Lightning Fabric's own strategy, which takes CUDA devices only; never run on any so far."""

    def __init__(self, timeout_seconds: float) -> None:
        super().__init__(2, timeout_seconds)
        self.name = "fabric-deepspeed"

    def _initialise(self, optimizer: AdamW) -> Any:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DeepSpeedStrategy

        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        strategy = DeepSpeedStrategy(config=settings(2))
        fabric = Fabric(accelerator="cuda", devices=here, num_nodes=self.size // here, strategy=strategy)
        fabric.launch()
        module, _ = fabric.setup(self._divided, optimizer)
        return module._forward_module  # DeepSpeed's engine, which `step` drives


def settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration; what is not said here would be changed behind our back."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # its default of 1.0 would clip after the projections; the loop clips before the step
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            # every weight is divided, however small, and none is fetched ahead: the order of passes changes
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }


@contextmanager
def without_lora(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The LoRA weights are views of one vector that stays whole: for a while they are not there."""
    found = [module for layer in layers for module in layer.modules() if hasattr(module, "lora_A")]
    kept = [(module.lora_A, module.lora_B) for module in found]
    for module in found:
        module.lora_A, module.lora_B = nn.ModuleDict(), nn.ModuleDict()
    try:
        yield
    finally:
        for module, (lora_a, lora_b) in zip(found, kept, strict=True):
            module.lora_A, module.lora_B = lora_a, lora_b
