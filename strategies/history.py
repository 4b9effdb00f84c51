"""What each update did to what was learned before it: R[i, j] over the hold-outs, carried from version to version.

R[i, j] = -(mean loss on the hold-out of update j after update i), nats per token: higher is better, as an accuracy is.
Of every held-out example the loss right after its update and the lowest one since are kept: BWT and forgetting are
paired over examples and have an interval (Lopez-Paz & Ranzato, arXiv:1706.08840; Chaudhry et al., arXiv:1801.10112).
Bounded: the latest `ROWS` updates, `EXAMPLES` examples; by the journal's row numbers, which say nothing once erased.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from strategies.evaluate import Probes, Scores, measure
from strategies.request import Measure, SequenceMetrics, write

HISTORY = "history.json"
ROWS, EXAMPLES = 64, 4096


class Known(msgspec.Struct, frozen=True, array_like=True):
    """One held-out example, nats per token."""

    learned: float
    """Right after the update that it belongs to."""
    best: float
    """The lowest since."""


class History(msgspec.Struct, frozen=True, kw_only=True):
    """`strategy/history.json` of a version."""

    examples: dict[int, Known] = {}
    """By the row in the journal, oldest first."""
    matrix: dict[str, dict[str, float]] = {}
    """R: update -> update of the hold-out -> score."""


def read_history(version: Path | None) -> History:
    """What a version knows of its past; empty for the first one, or where an older program made it."""
    if version is None:
        return History()
    try:
        return msgspec.json.decode((version / "strategy" / HISTORY).read_bytes(), type=History)
    except FileNotFoundError:
        return History()


def write_history(directory: Path, history: History) -> None:
    """Beside the states of the methods: a rollback takes it back with them."""
    write(directory / HISTORY, history)


def losses_by_row(probes: Probes, scores: Scores, ids: Sequence[int]) -> dict[str, dict[int, float]]:
    """Group of hold-outs -> row of the journal -> loss. ids: the journal's row of each line of the experience."""
    return {
        name: {ids[item.index]: loss for item, loss in zip(items, scores.losses[name], strict=True)}
        for name, items in probes.groups().items()
        if name not in ("eval", "general")
    }


def after_update(history: History, update: int, losses: Mapping[str, Mapping[int, float]]) -> History:
    """The history with one more row of R and the new hold-out's first losses."""
    now = {str(update) if name == "new" else name: found for name, found in losses.items() if found}
    examples = dict(history.examples)
    for found in now.values():
        for identity, loss in found.items():
            past = examples.get(identity, Known(loss, loss))
            examples[identity] = Known(past.learned, min(past.best, loss))
    row = {name: -sum(found.values()) / len(found) for name, found in now.items()}
    matrix = {**history.matrix, str(update): row}
    return History(
        examples=dict(list(examples.items())[-EXAMPLES:]), matrix={name: matrix[name] for name in list(matrix)[-ROWS:]}
    )


def sequence_metrics(
    history: History, losses: Mapping[str, Mapping[int, float]], base: Mapping[str, Mapping[int, float]],
    before: Mapping[str, Mapping[int, float]], update: int, seed: int,
) -> SequenceMetrics:  # fmt: skip
    """ACC, BWT, FWT and forgetting, each with its interval over examples; None where there is nothing to take it of.

    history: before this update; losses, base, before: under the candidate, the base, and the version before.
    """
    old = [pair for name, found in losses.items() if name != "new" for pair in found.items()]
    pairs = [(history.examples[identity], loss) for identity, loss in old if identity in history.examples]
    new = base.get("new", {})
    return SequenceMetrics(
        acc=_measure([-loss for found in losses.values() for loss in found.values()], seed),
        bwt=_measure([known.learned - loss for known, loss in pairs], seed),
        fwt=_measure([new[identity] - loss for identity, loss in before.get("new", {}).items()], seed),
        forgetting=_measure([loss - known.best for known, loss in pairs], seed),
        matrix=after_update(history, update, losses).matrix,
    )


def _measure(values: Sequence[float], seed: int) -> Measure | None:
    return measure(torch.tensor(values), seed) if values else None
