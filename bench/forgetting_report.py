"""The forgetting bench's results: a table for `docs/`, heat maps of R, and curves of ACC and drift."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.pictures import curves, heat_maps
from strategies.metrics import accuracy, backward_transfer, bootstrap, forgetting, forward_transfer


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What one update took."""

    cpu_seconds: float
    """Of the trainer's process, from its start to its end."""
    tokens: int
    """Trained on."""
    peak_memory_bytes: int
    version_bytes: int
    """Adapter and the states of the methods."""
    kept_bytes: int
    """All versions that are kept."""
    journal_bytes: int
    """The database: every example that ever came in."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence, one strategy, one seed."""

    strategy: str
    seed: int
    tasks: list[str]
    recipe: list[str]
    learning_rate: float
    batch_examples: int = 8
    """Of an optimiser step."""
    before: list[float] = []
    """Score of the base on every task."""
    nll_before: float = 0.0
    """Its loss on general text."""
    scores: list[list[float]] = []
    """R: (updates, tasks)"""
    drift_kl: list[float] = []
    """KL(base || model) on general text after every update, nats per token."""
    drift_nll: list[float] = []
    """Change of the loss on it."""
    costs: list[Cost] = []
    """Of every update."""

    def is_same_setting(self, other: "Cell") -> bool:
        """Whether two cells may be compared, so that a finished one need not be measured again."""
        fields = ("strategy", "seed", "tasks", "recipe", "learning_rate", "batch_examples")
        return all(getattr(self, field) == getattr(other, field) for field in fields)

    @property
    def is_sequence(self) -> bool:
        """One update per task; joint training is a single one."""
        return len(self.scores) == len(self.tasks)

    def numbers(self) -> dict[str, float]:
        """What is averaged over seeds, scores in percent."""
        matrix = np.asarray(self.scores)
        found = {"ACC": 100 * float(matrix[-1].mean())}
        if self.is_sequence:
            found["ACC"] = 100 * accuracy(matrix)
            found["BWT"] = 100 * backward_transfer(matrix)
            found["FWT"] = 100 * forward_transfer(matrix, self.before)
            found["forgetting"] = 100 * forgetting(matrix)
        found |= {"drift KL": self.drift_kl[-1], "drift NLL": self.drift_nll[-1]}
        return found | {"CPU seconds": sum(cost.cpu_seconds for cost in self.costs)}

    def summary(self) -> str:
        """One line."""
        return f"{self.strategy} seed {self.seed}: " + ", ".join(f"{k} {v:.2f}" for k, v in self.numbers().items())


LONG = 8
"""Updates from which on a report says what each took."""
SETTLED = 4
"""The buffer has a past by then, and the retention something to remove."""
COLUMNS = ("ACC", "BWT", "FWT", "forgetting", "drift KL", "drift NLL", "CPU seconds")


def write_report(cells: Sequence[Cell], title: str, docs: Path) -> Path:
    """`docs/forgetting-TITLE.md` and its pictures; returns the page."""
    docs.mkdir(parents=True, exist_ok=True)
    by_strategy: dict[str, list[Cell]] = {}
    for cell in cells:
        by_strategy.setdefault(cell.strategy, []).append(cell)
    pictures = plot(by_strategy, title, docs)
    page = docs / f"forgetting-{title}.md"
    page.write_text(text_of(by_strategy, title, pictures), "utf-8")
    return page


def text_of(by_strategy: dict[str, list[Cell]], title: str, pictures: Sequence[Path]) -> str:
    """The page."""
    first = next(iter(by_strategy.values()))[0]
    seeds = sorted({cell.seed for cells in by_strategy.values() for cell in cells})
    lines = [
        f"# Forgetting: {title}",
        "",
        f"Tasks in their order: {', '.join(first.tasks)}. Seeds {', '.join(map(str, seeds))}, one where no more were"
        " run; from three seeds on, 95 % bootstrap intervals over seeds stand in brackets."
        " Scores in percent: facts by all answer tokens on paraphrased questions, classification by argmax over the"
        " options. Drift in nats per token on general text that is neither trained on nor rehearsed.",
        "",
        "| strategy | learning rate | examples a step | seeds | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * (3 + len(COLUMNS)),
        *(f"| {name} | {cells[0].learning_rate:g} | {cells[0].batch_examples} | {len(cells)} | "
          + " | ".join(_row(cells)) + " |"
          for name, cells in by_strategy.items()),
        "",
        *(line for name, cells in by_strategy.items() for line in _growth(name, cells[0])),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
        "",
        "Recipes:",
        "",
        *(f"- `{name}`: " + (", ".join(f"`{each}`" for each in cells[0].recipe) or "no protection")
          for name, cells in by_strategy.items()),
        "",
        "Made by `python -m bench.forgetting`; see its `--help`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _growth(name: str, cell: Cell) -> list[str]:
    """The table of what each update took, for sequences that are long enough to see something grow."""
    if len(cell.costs) < LONG:
        return []
    rows = [(cost.cpu_seconds, cost.tokens, *(size / 2**20 for size in _sizes(cost))) for cost in cell.costs]
    slopes = [growth(column) for column in zip(*rows, strict=True)]
    return [
        f"## Each update with `{name}`, seed {cell.seed}",
        "",
        f"Growth: least-squares slope from update {SETTLED} on, per update, in percent of the mean. The journal holds"
        " every example that came in: it grows with what is dropped.",
        "",
        "| update | ACC so far | CPU seconds | tokens | peak MiB | version MiB | versions kept MiB | journal MiB |",
        "| ---: |" + " ---: |" * 7,
        *(f"| {update} | {seen:.1f} | " + " | ".join(_number(value) for value in row) + " |"
          for update, (seen, row) in enumerate(zip(_seen(cell), rows, strict=True), 1)),
        f"| growth | {growth(_seen(cell)):+.1f} % | " + " | ".join(f"{slope:+.1f} %" for slope in slopes) + " |",
        "",
    ]  # fmt: skip


def _sizes(cost: Cost) -> tuple[int, ...]:
    return cost.peak_memory_bytes, cost.version_bytes, cost.kept_bytes, cost.journal_bytes


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def growth(values: Sequence[float]) -> float:
    """Least-squares slope per update from update `SETTLED` on, in percent of the mean there; 0 for nothing but 0."""
    settled = np.asarray(values[SETTLED - 1 :], dtype=float)
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    # rounded, so that a level line is +0.0 and never -0.0
    return round(100 * slope / float(settled.mean()), 6) + 0.0 if settled.any() else 0.0


def _row(cells: Sequence[Cell]) -> list[str]:
    found = [cell.numbers() for cell in cells]
    return [_interval([numbers[column] for numbers in found if column in numbers], column) for column in COLUMNS]


def _interval(values: Sequence[float], column: str) -> str:
    if not values:
        return "-"
    digits = 3 if column.startswith("drift") else 0 if column == "CPU seconds" else 1
    text = f"{float(np.mean(values)):.{digits}f}"
    if len(values) < 3 or column == "CPU seconds":
        return text
    low, high = bootstrap(values)
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def plot(by_strategy: dict[str, list[Cell]], title: str, docs: Path) -> list[Path]:
    """Heat maps of the mean R with the base row, and ACC and drift over the updates; nothing for joint training."""
    sequences = {name: cells for name, cells in by_strategy.items() if cells[0].is_sequence}
    if not sequences:
        return []
    tasks = next(iter(sequences.values()))[0].tasks
    drawn = {
        docs / f"forgetting-{title}-R.svg": heat_maps(
            {name: _mean([[cell.before, *cell.scores] for cell in cells]) for name, cells in sequences.items()},
            ["base", *tasks], tasks,
        ),
        docs / f"forgetting-{title}-curves.svg": curves({
            "mean score on the tasks so far, %": {name: _mean([_seen(cell) for cell in cells])
                                                  for name, cells in sequences.items()},
            "KL(base || model), nats per token": {name: _mean([cell.drift_kl for cell in cells])
                                                  for name, cells in sequences.items()},
        }),
    }  # fmt: skip
    for path, picture in drawn.items():
        path.write_text(picture, "utf-8")
    return list(drawn)


def _mean(values: Sequence[object]) -> Any:
    return np.mean(np.asarray(values, dtype=float), axis=0).tolist()


def _seen(cell: Cell) -> list[float]:
    return [100 * float(np.mean(row[: update + 1])) for update, row in enumerate(cell.scores)]
