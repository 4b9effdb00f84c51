"""Avalanche's EWC, GEM and A-GEM as they are shipped, on a PEFT model of SmolLM2's size: what a step of them costs.

Two experiences; the second is timed, where the plugins act, against a second experience of `Naive` in the same process.
Documents are padded beforehand and the batches small: the shipped plugins work on all parameters, frozen ones included,
so what they add does not depend on the documents. What fails says how.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bench.peers.avalanche_naive import IGNORED, Classifier, Documents, Silent, Stopwatch
from bench.peers.trainers import peft_model
from bench.peers.work import Mark, Work, child, forget_peak, peak_bytes
from bench.speed_report import Overhead
from strategies.lean_avalanche import AvalancheDataset, DatasetExperience, EvaluationPlugin, SupervisedPlugin

BATCH, STEPS = 2, 2
"""Documents of a step; steps of each experience, of which the first is not timed."""


def plugin(name: str) -> SupervisedPlugin[Any]:
    """As its documentation says; one constraint, and a reference batch as large as the batch."""
    from avalanche.training.plugins import AGEMPlugin, EWCPlugin, GEMPlugin

    made: dict[str, Any] = {
        "ewc": lambda: EWCPlugin(ewc_lambda=1.0),
        "gem": lambda: GEMPlugin(patterns_per_experience=BATCH, memory_strength=0.5),
        "agem": lambda: AGEMPlugin(patterns_per_experience=BATCH, sample_size=BATCH),
    }
    found: SupervisedPlugin[Any] = made[name]()
    return found


def experiences(work: Work) -> list[DatasetExperience[Any]]:
    """Two, on the same short documents: the same cost, whoever trains on them."""
    documents = [sorted(batch, key=len)[:BATCH] for batch in work.batches[:STEPS]]
    rows = [document for batch in documents for document in batch]
    return [
        DatasetExperience(dataset=AvalancheDataset([Documents(rows)]), current_experience=number) for number in range(2)
    ]


def run(work: Work, plugins: Sequence[SupervisedPlugin[Any]]) -> list[Mark]:
    """The ends of the second experience's steps."""
    from avalanche.training.supervised.strategy_wrappers import Naive

    model = Classifier(peft_model(work, torch.float32))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    watch = Stopwatch(work.clip_norm)
    strategy = Naive(
        model=model, optimizer=torch.optim.AdamW(trained, lr=work.learning_rate, weight_decay=work.weight_decay),
        criterion=nn.CrossEntropyLoss(ignore_index=IGNORED), train_mb_size=BATCH, train_epochs=1,
        plugins=[*plugins, watch], evaluator=EvaluationPlugin(loggers=[Silent()]),  # type: ignore[no-untyped-call]
    )  # fmt: skip
    for experience in experiences(work):
        watch.marks.clear()
        strategy.train(experience, eval_streams=[], shuffle=False, num_workers=0)
    return list(watch.marks)


def seconds(marks: Sequence[Mark]) -> float:
    """CPU seconds per timed step."""
    return (marks[-1].cpu - marks[0].cpu) / (len(marks) - 1)


def measure(work: Work, name: str) -> Overhead:
    """Naive, then the plugin."""
    forget_peak()
    plain = run(work, [])
    naive_bytes = peak_bytes()
    forget_peak()
    try:
        shipped = run(work, [plugin(name)])
    except (RuntimeError, ValueError, ArithmeticError, ImportError) as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        return Overhead(ratio=0.0, step_seconds=0.0, extra_bytes=0, first_losses=[], failure=failure)
    return Overhead(
        ratio=seconds(shipped) / seconds(plain), step_seconds=seconds(shipped),
        extra_bytes=peak_bytes() - naive_bytes, first_losses=[plain[0].loss, shipped[0].loss],
    )  # fmt: skip


if __name__ == "__main__":
    child(measure)
