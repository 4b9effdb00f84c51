"""What a strategy adds to a step: naive and protected training alternate in one process.

Per CPU second and trained token; the first step of each phase is not timed. GEM has two constraints and A-GEM one, each
with a reference batch as large as the optimiser batch, so their bounds are 1 + constraints and 2.
"""

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.peers.ours import adapter_of, items_of, request_of, run, unshuffled
from bench.peers.work import Work, child, forget_peak, peak_bytes
from bench.speed_report import Overhead
from buffers.experience import Role
from strategies.adapter import Adapter
from strategies.catalog import AGem, Distill, Ewc, Gem, Replay, Strategy
from strategies.checkpoint import save_states
from strategies.dataset import Item
from strategies.ewc import ElasticWeightConsolidation
from strategies.learner import Learner

UPDATE = 3
"""Two updates lie in the past."""


def recipe(name: str, examples: int) -> list[Strategy]:
    """The strategy alone; distillation holds the rehearsed documents, so it has replay beside it."""
    known: dict[str, list[Strategy]] = {
        "ewc": [Ewc()],
        "replay": [Replay(ratio=0.5)],
        "distill": [Replay(ratio=0.5), Distill(on="replay")],
        "agem": [AGem(examples=examples)],
        "gem": [Gem(constraints=2, examples=examples)],
    }
    return known[name]


def rows(work: Work, name: str) -> Mapping[Role, Sequence[Item]]:
    """The same documents for everybody; half of them count as replayed where something is rehearsed."""
    items = unshuffled(items_of(work.documents), work.seed)
    found: dict[Role, Sequence[Item]] = defaultdict(list, {"new": items})
    if name in ("replay", "distill"):
        # the loop lays the new ones before the replayed ones
        half = len(items) // 2
        found |= {"new": items[:half], "replay": items[half:]}
    if name in ("agem", "gem"):
        batch = work.batches[-1]
        found["memory"] = [item for update in (1, 2) for item in items_of(batch, "memory", update)]
    return found


def parent_of(adapter: Adapter, name: str, directory: Path) -> Path | None:
    """What the version before has left behind: EWC's importances."""
    if name != "ewc":
        return None
    consolidation = ElasticWeightConsolidation(Ewc())
    mean, fisher = adapter.flat.clone(), adapter.flat.abs() + 0.5
    consolidation.load_state({"fisher": fisher, "mean": mean}, {"offset": 0.0, "updates": 1})
    learners: list[Learner] = [consolidation]
    save_states(directory / "strategy", learners)
    return directory


def phase(
    adapter: Adapter,
    work: Work,
    strategies: Sequence[Strategy],
    items: Mapping[Role, Sequence[Item]],
    parent: Path | None,
) -> tuple[float, float, int]:
    """CPU seconds per step; loss of the first step; peak bytes of the phase."""
    start = adapter.flat.clone()
    forget_peak()
    marks = run(adapter, request_of(work, len(work.batches[0]), strategies, parent, UPDATE), items, work.steps)
    adapter.assign(start)
    return (marks[-1].cpu - marks[0].cpu) / (len(marks) - 1), marks[0].loss, peak_bytes()


def measure(work: Work, name: str) -> Overhead:
    """`rounds` pairs of phases."""
    adapter = adapter_of(work)
    strategies, items = recipe(name, len(work.batches[0])), rows(work, name)
    # the naive phase trains on the same documents in the same order
    plain: Mapping[Role, Sequence[Item]] = {"new": [*items["new"], *items["replay"]]}
    naive, protected = [], []
    with tempfile.TemporaryDirectory() as directory:
        parent = parent_of(adapter, name, Path(directory))
        phase(adapter, work, [], plain, None)  # warm
        for _ in range(work.rounds):
            naive.append(phase(adapter, work, [], plain, None))
            protected.append(phase(adapter, work, strategies, items, parent))
    return Overhead(
        ratio=statistics.median(mine[0] / its[0] for mine, its in zip(protected, naive, strict=True)),
        step_seconds=statistics.median(mine[0] for mine in protected),
        extra_bytes=int(statistics.median(mine[2] - its[2] for mine, its in zip(protected, naive, strict=True))),
        first_losses=[naive[0][1], protected[0][1]],
    )


if __name__ == "__main__":
    child(measure)
