"""What every child of the speed bench is given and gives back. Torch-free.

A child is `python -m bench.peers.NAME WORK.json RESULT.json [VARIANT]`. All trainers get the same optimiser batches of
token ids and the same LoRA; each step's end is marked, and what is timed lies between the end of the first step, which
warms up, and the end of the last.
"""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One child's task."""

    base: str
    """Directory of the base model."""
    batches: list[list[list[int]]]
    """Optimiser batches of documents of token ids; every token but a document's first is a label."""
    steps: int = 2
    """The first one is not timed."""
    rounds: int = 1
    """Repetitions inside a child, where it alternates itself."""
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    rank: int = 16
    alpha: float = 32.0
    seed: int = 0
    texts: list[str] = []
    """Further documents: hold-outs of a whole update."""

    @property
    def documents(self) -> list[list[int]]:
        """Those of the steps, in their order."""
        return [document for batch in self.batches[: self.steps] for document in batch]


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one step."""

    cpu: float
    """CPU seconds of the process so far."""
    wall: float
    loss: float = 0.0
    """Mean over the batch's label tokens, before the step, nats."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer's child measured."""

    marks: list[Mark]
    timed_tokens: int
    """Real tokens (no padding) of the steps that were timed."""
    peak_bytes: int
    notes: dict[str, Any] = {}

    @property
    def tokens_per_cpu_second(self) -> float:
        """The figure that a busy machine disturbs least."""
        return self.timed_tokens / (self.marks[-1].cpu - self.marks[0].cpu)

    @property
    def tokens_per_second(self) -> float:
        """By the wall clock."""
        return self.timed_tokens / (self.marks[-1].wall - self.marks[0].wall)

    @property
    def losses(self) -> list[float]:
        """Of all steps."""
        return [mark.loss for mark in self.marks]


def mark(loss: float = 0.0) -> Mark:
    """Now."""
    return Mark(cpu=time.process_time(), wall=time.perf_counter(), loss=loss)


def result_of(work: Work, marks: list[Mark], **notes: Any) -> Result:
    """The child's answer; call it before anything else uses memory."""
    timed = sum(len(document) for batch in work.batches[1 : work.steps] for document in batch)
    return Result(marks=marks, timed_tokens=timed, peak_bytes=peak_bytes(), notes=notes)


def peak_bytes() -> int:
    """Largest resident size of this process since it began, or since `forget_peak`; not that of its parent."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def forget_peak() -> None:
    """Count the peak from now on (`proc(5)`, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def child(measure: Callable[[Work, str], Any]) -> None:
    """Read the work, measure, write the result. SIGTERM leaves through every `finally`: nothing stays behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Work)
    found = measure(work, sys.argv[3] if len(sys.argv) > 3 else "")
    Path(sys.argv[2]).write_bytes(msgspec.json.encode(found))
