"""Liger's kernels are asked for on a GPU, for families that it knows, and never for its losses."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from strategies import fused
from strategies.fused import fuse


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A library of the same shape as liger-kernel 0.8, and what it was asked for."""
    found: list[dict[str, Any]] = []
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    vars(package)["_apply_liger_kernel_to_instance"] = lambda **given: found.append(given)
    vars(patches)["MODEL_TYPE_TO_APPLY_LIGER_FN"] = {"llama": None}
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    monkeypatch.setattr(fused, "find_spec", lambda name: name == "liger_kernel" or None)
    return found


def model(kind: str) -> Any:
    """As far as anybody looks."""
    return SimpleNamespace(config=SimpleNamespace(model_type=kind))


def test_kernels_are_put_into_a_model_on_a_gpu(asked: list[dict[str, Any]]) -> None:
    """Norms, positions and the gate; the loss on label rows is ours."""
    base = model("llama")
    assert fuse(base, torch.device("cuda"))
    assert asked == [
        {"model": base, "rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False,
         "fused_linear_cross_entropy": False}
    ]  # fmt: skip


def test_nothing_is_fused_elsewhere(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a CPU, not for a family that the library does not know, not where it is not installed."""
    assert not fuse(model("llama"), torch.device("cpu"))
    assert not fuse(model("own"), torch.device("cuda"))
    monkeypatch.setattr(fused, "find_spec", lambda _: None)
    assert not fuse(model("llama"), torch.device("cuda"))
    assert asked == []
