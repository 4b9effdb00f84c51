"""Fused kernels where a base's own layers are called on a GPU: Liger's, in Triton (Hsu et al., arXiv:2410.10989).

RMSNorm, rotary positions and SwiGLU become one kernel each instead of four to eight, forward and back. They take the
linear layers as modules, so the adapter's own pass stays in its place. Liger's losses are left alone: ours works on
label rows in chunks already (`strategies.token_loss`). An extra: used where `eternad[liger]` is installed and knows the
base's family. Of its kernels SwiGLU and the positions were seen here, in Triton's interpreter; none on a GPU.
"""

from importlib.util import find_spec
from typing import Any

import torch

KERNELS = {"rope": True, "rms_norm": True, "swiglu": True}
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def fuse(model: Any, device: torch.device) -> bool:
    """Put the kernels into a loaded model, in place; False where there are none for it."""
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what HF's Trainer calls, too
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    _apply_liger_kernel_to_instance(model=model, **KERNELS, **LOSSES)
    return True
