"""The bridge between a running loop and its checkpoint: everything that makes a resumed run equal an unbroken one."""

import errno
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.checkpoint import random_states, restore_random_states, write_checkpoint
from strategies.early_stop import EarlyStop
from strategies.parallel.single import MOMENTS
from strategies.template import Position, Template


def restore_optimizer(template: Template, tensors: dict[str, Tensor]) -> None:
    """AdamW's moments, where they were kept; see `Backend.moments`."""
    if set(MOMENTS) <= tensors.keys():
        template.adapter.backend.load_moments(tensors)


def write(run_directory: Path, template: Template, early: EarlyStop, experience_sha256: str) -> None:
    """Write the checkpoint of a loop between two steps; all processes call it, the first one writes."""
    backend = template.adapter.backend
    moments = backend.moments()
    if backend.rank == 0:
        _write(run_directory, template, early, experience_sha256, moments)
    backend.wait()  # nobody leaves, or is told to, before it is on disk


def _write(
    run_directory: Path, template: Template, early: EarlyStop, experience_sha256: str, moments: dict[str, Tensor]
) -> None:
    tensors = {"flat": template.adapter.flat, "random/loop": template.generator.get_state(), **random_states()}
    tensors |= {f"optimizer/{key}": tensor for key, tensor in moments.items()}
    if early.best is not None:
        tensors["best"] = early.best
    notes: dict[str, Any] = {"position": asdict(template.position), "learners": {}, "early": _early_notes(early)}
    for learner in template.learners:
        own, notes["learners"][learner.name] = learner.state()
        tensors |= {f"learner/{learner.name}/{key}": tensor for key, tensor in own.items()}
    notes["micro_batch_tokens"] = template.micro_batch_tokens
    write_checkpoint(run_directory, template.step, tensors, notes, experience_sha256)


def restore(template: Template, early: EarlyStop, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Put a loop that has been set up, and done no step, where the checkpoint was written."""
    position = notes["position"]
    template.position = Position(**{**position, "losses": [(int(step), loss) for step, loss in position["losses"]]})
    template.adapter.assign(tensors["flat"].to(template.device))
    restore_optimizer(template, _under(tensors, "optimizer/"))
    for learner in template.learners:
        learner.load_state(_under(tensors, f"learner/{learner.name}/"), notes["learners"].get(learner.name, {}))
    for key, value in notes["early"].items():
        setattr(early, key, value)
    early.best = tensors["best"].to(template.device) if "best" in tensors else None
    template.clock.train_exp_iterations = template.clock.train_iterations = template.step
    template.generator.set_state(tensors["random/loop"])
    if template.adapter.backend.rank == 0:
        restore_random_states(tensors)
    else:  # the kept state is the first process's: with it, this one would drop out the same
        torch.manual_seed(template.seed + template.adapter.backend.rank + template.step)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _early_notes(early: EarlyStop) -> dict[str, Any]:
    keys = ("start_old", "best_loss", "worse_epochs", "history")
    return {key: getattr(early, key) for key in keys}


def is_disk_full(error: BaseException) -> bool:
    """Whether it was the disk; safetensors keeps the system's words and loses its number."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller micro-batch could help."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # the last one is oneDNN's: its exception carries no more than these words (seen under a limit by setrlimit(2))
    words = ("can't allocate memory", "not enough memory", "out of memory", "could not create a primitive")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)
