"""Reads an adapter from disk and proves that it is whole before any of it comes near the model.

Opened are `adapter_config.json`, `adapter_model.safetensors` and `manifest.json`, below the adapter root and nowhere
else; safetensors and JSON only, so that a pickle is bytes that fail to parse. safetensors has no checksum of its own:
the manifest's SHA-256, the shapes and a scan for NaN and infinity (by `SlotBank.prepare`) stand in for it. The hash,
half of the time that all this takes, is computed beside the rest.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from serving.refusal import Refusal
from serving.tensors import Torn, parse

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
CONFIG_BYTES, MANIFEST_BYTES = 1 << 20, 16 << 20
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
# what a PEFT configuration may switch on that is more than W + scale * B A
_UNSUPPORTED = ("use_dora", "modules_to_save", "layer_replication", "trainable_token_indices", "lora_bias")


class Pair(NamedTuple):
    """One linear layer's share of an adapter: W + scale * B A."""

    a: torch.Tensor  # (rank, inputs)
    b: torch.Tensor  # (outputs, rank)
    scale: float


class Staged(msgspec.Struct, frozen=True, kw_only=True):
    """A verified adapter in memory."""

    path: Path
    generation: str
    """`generation_of` its configuration and weights."""
    rank: int
    """The largest of its ranks."""
    tensors: list[torch.Tensor]
    """As `prepare` has laid them out."""


Prepare = Callable[[dict[str, Pair]], list[torch.Tensor]]
"""From {module name of the base model: pair} to what a commit copies; raises `Refusal` 400 for what does not fit."""


def stage(root: Path, path: str, max_rank: int, max_bytes: int, prepare: Prepare) -> Staged:
    """Read, verify and lay out the directory `path`; raises `Refusal` 404 (missing), 403 (outside), 400 (unfit)."""
    directory = jailed(root, path)
    config_bytes = _read(directory, CONFIG, CONFIG_BYTES)
    weights = _read(directory, WEIGHTS, max_bytes)
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as beside:
        hashed = beside.submit(hashlib.sha256, weights)
        config = _config(directory, config_bytes)
        pairs = _pairs(directory, weights, config)
        rank = max(pair.a.shape[0] for pair in pairs.values())
        if rank > max_rank:
            raise Refusal(400, f"{directory}: rank {rank} is above this server's --max-rank {max_rank}")
        tensors = prepare(pairs)
        digest = hashed.result().hexdigest()
    _check_manifest(directory, {CONFIG: hashlib.sha256(config_bytes).hexdigest(), WEIGHTS: digest})
    return Staged(path=directory, generation=generation_of(config, digest), rank=rank, tensors=tensors)


def jailed(root: Path, path: str) -> Path:
    """`path` (absolute, or below `root`) without symbolic links; `Refusal` 403 when it leaves `root`, 404 if absent."""
    root = root.resolve()
    if "\0" in path:
        raise Refusal(400, "lora_path contains a NUL byte")
    directory = (root / path).resolve()
    if not directory.is_relative_to(root) or directory == root:
        raise Refusal(403, f"lora_path {path!r} is not below the adapter root {root}")
    if not directory.is_dir():
        raise Refusal(404, f"no adapter found: {directory} is not a directory")
    return directory


def generation_of(config: dict[str, Any], weights_sha256: str) -> str:
    """SHA-256 (hex) of the canonical JSON of the configuration, a newline, and the hex SHA-256 of the weights file."""
    canonical = msgspec.json.encode(config, order="sorted")
    return hashlib.sha256(canonical + b"\n" + weights_sha256.encode()).hexdigest()


def _read(directory: Path, name: str, limit: int) -> bytearray:
    """A regular file of at most `limit` bytes, never through a link, never blocking on a pipe."""
    try:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Refusal(404, f"no adapter found: {directory} has no {name}") from None
    except OSError as error:
        raise Refusal(400, f"{directory / name}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Refusal(400, f"{directory / name}: not a regular file")
        if status.st_size > limit:
            raise Refusal(400, f"{directory / name}: {status.st_size} bytes, more than any fitting adapter ({limit})")
        buffer = bytearray(status.st_size)
        del buffer[file.readinto(buffer) :]
        return buffer


def _check_manifest(directory: Path, found: dict[str, str]) -> None:
    """Compare with the `files` of `manifest.json` ({name: sha256} or {name: {"sha256": ...}}) where there is one."""
    if not (directory / MANIFEST).exists():
        return
    try:
        files = msgspec.json.decode(_read(directory, MANIFEST, MANIFEST_BYTES))["files"]
        expected = {name: entry if isinstance(entry, str) else entry["sha256"] for name, entry in files.items()}
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(400, f"{directory / MANIFEST}: torn or without `files`: {error}") from None
    for name, digest in found.items():
        if expected.get(name) != digest:
            raise Refusal(400, f"{directory / name}: SHA-256 {digest} is not the manifest's {expected.get(name)}")


def _config(directory: Path, body: bytearray) -> dict[str, Any]:
    try:
        config: dict[str, Any] = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise Refusal(400, f"{directory / CONFIG}: {error}") from None
    if config.get("peft_type") != "LORA":
        raise Refusal(400, f"{directory / CONFIG}: peft_type {config.get('peft_type')!r}, only LORA is served")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if used or config.get("bias", "none") != "none":
        raise Refusal(400, f"{directory / CONFIG}: {', '.join(used) or 'bias'} is not supported, only plain LoRA")
    return config


def _pairs(directory: Path, weights: bytearray, config: dict[str, Any]) -> dict[str, Pair]:
    """{module: (A, B)}: every tensor belongs to a pair, and A and B have one rank."""
    try:
        tensors = parse(weights)
    except Torn as error:
        raise Refusal(400, f"{directory / WEIGHTS}: torn, or not safetensors: {error}") from None
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise Refusal(400, f"{directory / WEIGHTS}: tensor {key!r} is not a LoRA weight of a linear layer")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise Refusal(400, f"{directory / WEIGHTS}: no tensors")
    return {module: _pair(directory, module, found, config) for module, found in sides.items()}


def _pair(directory: Path, module: str, sides: dict[str, torch.Tensor], config: dict[str, Any]) -> Pair:
    a, b = sides.get("A"), sides.get("B")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        shapes = {side: tuple(tensor.shape) for side, tensor in sides.items()}
        raise Refusal(400, f"{directory / WEIGHTS}: module {module!r} has shapes {shapes}, not (r, in) and (out, r)")
    return Pair(a, b, scaling(config, module, a.shape[0]))


def scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv:2312.03732); patterns match endings of names."""
    alpha = next(
        (
            value
            for pattern, value in (config.get("alpha_pattern") or {}).items()
            if re.match(rf"(.*\.)?({pattern})$", module)
        ),
        config.get("lora_alpha", rank),
    )
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
