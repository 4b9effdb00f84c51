"""The frozen base of an adapter: in which precision, on which device, with which attention and kernels it is loaded."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from strategies.attention import attention_for
from strategies.failure import Failure
from strategies.fused import fuse
from strategies.quantize import Quantize, prepare
from strategies.quantize import options as quantized
from strategies.request import Wanted


def compute_dtype(precision: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The precision of the base weights and of matrix products; LoRA weights stay float32.

    `auto` is decided by what the processor can do, not by a measurement, so that a resumed run decides the same.
    """
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def device_of(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto`: a GPU where there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Failure("no_cuda", "device = 'cuda', but torch finds no CUDA device; set device = 'auto' or 'cpu'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


_ahead: dict[Hashable, tuple[Any, Any]] = {}
"""A base that was loaded before a run asked for it, and its tokenizer; taken once: an adapter changes the model."""


def load_ahead(wanted: Wanted) -> None:
    """Load what the next `load_base` will be asked for. Of GPUs and 4-bit weights only the libraries: memory waits."""
    place = device_of(wanted.device)
    if place.type != "cpu" or wanted.quantize != "none":
        return
    torch.set_num_threads(wanted.threads)
    dtype = compute_dtype(wanted.precision, place)
    key = _identity(wanted.base_path, dtype, place, wanted.quantize)
    _ahead[key] = _load(wanted.base_path, dtype, place, wanted.quantize)


def load_base(base_path: Path, dtype: torch.dtype, device: torch.device, quantize: Quantize) -> tuple[Any, Any]:
    """The model and its tokenizer, from a local directory; raises `Failure` for what is none."""
    key = _identity(base_path, dtype, device, quantize)
    return _ahead.pop(key) if key in _ahead else _load(base_path, dtype, device, quantize)


def _identity(base_path: Path, dtype: torch.dtype, device: torch.device, quantize: Quantize) -> Hashable:
    """Equal as long as nobody has changed a file of the base."""
    files = [path for path in base_path.glob("*") if path.is_file()]
    stamps = frozenset((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    return base_path, dtype, device, quantize, stamps


def _load(base_path: Path, dtype: torch.dtype, device: torch.device, quantize: Quantize) -> tuple[Any, Any]:
    if not (base_path / "config.json").is_file():
        raise Failure("base_missing", f"no base model at {base_path} (config.json, safetensors, tokenizer expected)")
    transformers_logging.disable_progress_bar()
    attention = attention_for(device, dtype)
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(base_path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            base_path, config=config, dtype=dtype, attn_implementation=attention, use_safetensors=True,
            **options, **quantized(quantize, dtype, device),
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(base_path, **options)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise Failure("base_unreadable", f"cannot load the base model at {base_path}: {error}") from error
    if quantize == "none":
        model = cast(Any, model).to(device)
    prepare(model)
    fuse(model, device)
    return model.eval(), tokenizer
