"""PEFT's LoRA as a GGUF adapter, as llama.cpp's own `convert_lora_to_gguf.py` writes it, in 1 s instead of 11.

Two things are easy to get wrong and load without a word: llama.cpp keeps the rows of q_proj and k_proj of Llama models
in another order (pairs of rotary halves interleaved), so `lora_B` of both is permuted; and scaling is alpha / rank per
adapter only, so ours is folded into B and alpha is 0 ("no scaling").
"""

import json
import re
from pathlib import Path
from typing import Any

import msgspec

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


class BaseShape(msgspec.Struct, frozen=True):
    """What the conversion must know about the base."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int


def base_shape(gguf_file: Path) -> BaseShape:
    """Out of the base model's GGUF header."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields
    architecture = str(fields["general.architecture"].contents())

    def number(key: str) -> int:
        return int(fields[f"{architecture}.{key}"].contents())

    heads = number("attention.head_count")
    shared = f"{architecture}.attention.head_count_kv" in fields
    return BaseShape(architecture, number("block_count"), heads, number("attention.head_count_kv") if shared else heads)


def convert(adapter: Path, shape: BaseShape, target: Path, label: str = "") -> None:
    """Write the adapter directory as one GGUF file; raises `ValueError` for what llama.cpp cannot serve.

    `label`: what llama-server says of a loaded adapter (`task_name` of its `GET /lora-adapters`).
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config = json.loads((adapter / "adapter_config.json").read_bytes())
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds.get(shape.architecture, MODEL_ARCH.LLAMA), shape.layers)
    writer = _writer(target, shape, label)
    for key, tensor in sorted(_tensors(adapter / "adapter_model.safetensors").items()):
        match = _KEY.match(key)
        name = match and names.get_name(match["module"] + ".weight", try_suffixes=(".weight",))
        if match is None or name is None:
            raise ValueError(f"{adapter}: llama.cpp has no place for {key}")
        is_b = match["side"] == "B"
        scaled = _scaled(tensor, match["module"], config, shape) if is_b else tensor
        writer.add_tensor(f"{name}.lora_{'b' if is_b else 'a'}", scaled.astype("float32"))
    _write(writer)


def write_empty(shape: BaseShape, target: Path) -> None:
    """An adapter that changes nothing, for a slot that no version has."""
    _write(_writer(target, shape, ""))


def _writer(target: Path, shape: BaseShape, label: str) -> Any:
    from gguf import GGUFWriter

    writer = GGUFWriter(target, shape.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_string("adapter.lora.task_name", label)
    writer.add_float32("adapter.lora.alpha", 0.0)
    return writer


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _scaled(b: Any, module: str, config: dict[str, Any], shape: BaseShape) -> Any:
    return _permuted(b, module, shape) * _scaling(config, module, b.shape[1])


def _permuted(rows: Any, module: str, shape: BaseShape) -> Any:
    """rows: (outputs, rank). Rotary halves [0..d/2), [d/2..d) of each head become neighbours."""
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(module.rpartition(".")[2])
    if shape.architecture != "llama" or heads is None:
        return rows
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    patterns = (config.get("alpha_pattern") or {}).items()
    alphas = [alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
    alpha = alphas[0] if alphas else config["lora_alpha"]
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _tensors(path: Path) -> dict[str, Any]:
    """{key: float32 array}; bfloat16, which numpy lacks, is the upper half of a float32."""
    import numpy as np
    import safetensors

    arrays = {}
    for key, found in safetensors.deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[found["dtype"]]
        array = np.frombuffer(found["data"], dtype=kind).reshape(found["shape"])
        if found["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        arrays[key] = array.astype("<f4")
    return arrays
