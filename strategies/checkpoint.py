"""What outlives a run (the states of the methods) and what outlives an interruption (checkpoints).

A checkpoint is one safetensors file and, written after it, `checkpoint.json` with its name and SHA-256: readers trust
only the latter. Anything that does not fit together is ignored and the run begins anew.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from strategies.failure import Failure
from strategies.learner import Learner
from strategies.request import write

MARKER = "checkpoint.json"


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """`checkpoint.json`."""

    format: str = "eternad.checkpoint/1"
    file: str
    sha256: str
    experience_sha256: str
    notes: dict[str, Any]


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file (temporary name, fsync, rename); returns its SHA-256."""
    body = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return hashlib.sha256(body).hexdigest()


def write_checkpoint(
    run_directory: Path, step: int, tensors: Mapping[str, Tensor], notes: dict[str, Any], experience_sha256: str
) -> None:
    """Make this the checkpoint of the run, then drop the one before."""
    name = f"checkpoint-{step:08d}.safetensors"
    digest = save_tensors(run_directory / name, tensors)
    write(
        run_directory / MARKER,
        Marker(file=name, sha256=digest, experience_sha256=experience_sha256, notes=notes),
    )
    for other in run_directory.glob("checkpoint-*.safetensors"):
        if other.name != name:
            other.unlink()


def read_checkpoint(run_directory: Path, experience_sha256: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and notes of the run's checkpoint; None when there is none, or it is torn, or of other data."""
    try:
        marker = msgspec.json.decode((run_directory / MARKER).read_bytes(), type=Marker)
        body = (run_directory / marker.file).read_bytes()
    except (OSError, msgspec.DecodeError):
        return None
    if hashlib.sha256(body).hexdigest() != marker.sha256 or marker.experience_sha256 != experience_sha256:
        return None
    return safetensors.torch.load(body), marker.notes


def remove_checkpoint(run_directory: Path) -> None:
    """The run is done: its checkpoint is of no more use."""
    (run_directory / MARKER).unlink(missing_ok=True)
    for path in run_directory.glob("checkpoint-*.safetensors"):
        path.unlink()


def random_states() -> dict[str, Tensor]:
    """The state of torch's own generators (dropout); (bytes,) uint8 each."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])


def save_states(directory: Path, learners: Iterable[Learner]) -> None:
    """Write `NAME.safetensors` and `NAME.json` for every method that has something to remember."""
    directory.mkdir(parents=True, exist_ok=True)
    for learner in learners:
        tensors, notes = learner.state()
        if tensors:
            save_tensors(directory / f"{learner.name}.safetensors", tensors)
        if tensors or notes:
            write(directory / f"{learner.name}.json", notes)


def load_states(directory: Path, learners: Iterable[Learner]) -> None:
    """Give every method what it remembered in the parent version; a method that is new there starts empty."""
    for learner in learners:
        try:
            notes = json.loads((directory / f"{learner.name}.json").read_bytes())
        except FileNotFoundError:
            continue
        path = directory / f"{learner.name}.safetensors"
        try:
            learner.load_state(safetensors.torch.load_file(path) if path.exists() else {}, notes)
        except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
            raise Failure("strategy_state", f"cannot use {path} of the parent version: {error!r}") from error


OPTIMIZER_FILE = "optimizer.safetensors"


def save_optimizer(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep the optimiser's moments with the version (`keep_optimizer`)."""
    save_tensors(directory / OPTIMIZER_FILE, tensors)


def load_optimizer(directory: Path) -> dict[str, Tensor]:
    """The parent version's moments; empty when it kept none."""
    path = directory / OPTIMIZER_FILE
    return safetensors.torch.load_file(path) if path.exists() else {}
