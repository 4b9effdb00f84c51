"""Our own training phase, as the daemon's child runs it."""

import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench.peers.work import Mark, Result, Work, child, mark, result_of
from buffers.experience import Role
from strategies.adapter import Adapter, load_adapter
from strategies.catalog import Strategy
from strategies.course import Course
from strategies.dataset import Item
from strategies.evaluate import Probes
from strategies.pulse import Interrupted, Pulse
from strategies.request import Lora, RunRequest, Training

EPOCHS = 200
"""Planned, never reached: in the first steps of so many the cosine schedule is as good as constant."""


class Stopwatch(Pulse):
    """Marks the end of every step and leaves the loop after `steps`."""

    def __init__(self, run_directory: Path, steps: int) -> None:
        super().__init__(run_directory)
        self.wanted = steps
        self.marks: list[Mark] = []

    def step(self, step: int, steps: int, epoch: float, loss: float, tokens_per_second: float, eta: float) -> None:
        """After an optimiser step; raises `Interrupted` after the last one that is wanted."""
        super().step(step, steps, epoch, loss, tokens_per_second, eta)
        self.marks.append(mark(loss))
        if len(self.marks) >= self.wanted:
            raise Interrupted


def adapter_of(work: Work) -> Adapter:
    """The base with a fresh adapter; one thread."""
    torch.set_num_threads(1)
    return load_adapter(Path(work.base), Lora(rank=work.rank, alpha=work.alpha, dropout=0.0), seed=work.seed)


def request_of(
    work: Work, batch_examples: int, strategies: Sequence[Strategy] = (), parent: Path | None = None, update: int = 1
) -> RunRequest:
    """The training phase's settings: those of the peers, and the daemon's defaults for the rest."""
    training = Training(
        learning_rate=work.learning_rate, epochs=EPOCHS, batch_examples=batch_examples, weight_decay=work.weight_decay,
        warmup_share=0.0, clip_norm=work.clip_norm, early_stop_patience=0,
    )  # fmt: skip
    return RunRequest(
        run_id="bench", model="bench", update_number=update, base_path=Path(work.base), parent_version=parent,
        experience_sha256="", lora=Lora(rank=work.rank, alpha=work.alpha, dropout=0.0), training=training,
        strategies=list(strategies), seed=work.seed,
    )  # fmt: skip


def items_of(documents: Sequence[list[int]], role: Role = "new", update: int = 1) -> list[Item]:
    """Documents as the trainer sees them: a loss on every token but the first."""
    return [
        Item(index=place, role=role, shape="text", update=update, tokens=document, start=1)
        for place, document in enumerate(documents)
    ]


def unshuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The order from which the loop's own shuffle of the first epoch makes the order of `items`."""
    order = list(range(len(items)))
    random.Random(f"{seed}/0").shuffle(order)
    back = sorted(range(len(items)), key=lambda place: order[place])
    return [items[place] for place in back]


def run(adapter: Adapter, request: RunRequest, items: Mapping[Role, Sequence[Item]], steps: int) -> list[Mark]:
    """The ends of the first `steps` steps."""
    with tempfile.TemporaryDirectory() as directory:
        watch = Stopwatch(Path(directory), steps)
        try:
            Course(Path(directory), request, adapter, items, Probes(new=[], old={}, eval=[]), watch).run()
        except Interrupted:
            return watch.marks
    raise RuntimeError(f"the loop ended after {len(watch.marks)} of {steps} steps")


def measure(work: Work, _: str) -> Result:
    """The trainer's child."""
    items = unshuffled(items_of(work.documents), work.seed)
    marks = run(adapter_of(work), request_of(work, len(work.batches[0])), {"new": items}, work.steps)
    return result_of(work, marks)


if __name__ == "__main__":
    child(measure)
