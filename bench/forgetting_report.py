"""The forgetting bench's results: a table for `docs/`, heat maps of R, and curves of ACC and drift."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from strategies.metrics import accuracy, backward_transfer, bootstrap, forgetting, forward_transfer


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence, one strategy, one seed."""

    strategy: str
    seed: int
    tasks: list[str]
    recipe: list[str]
    learning_rate: float
    before: list[float] = []
    """Score of the base on every task."""
    scores: list[list[float]] = []
    """R: (updates, tasks)"""
    drift_kl: list[float] = []
    """KL(base || model) on general text after every update, nats per token."""
    drift_nll: list[float] = []
    """Change of the loss on it."""
    train_seconds: float = 0.0

    def is_same_setting(self, other: "Cell") -> bool:
        """Whether two cells may be compared, so that a finished one need not be measured again."""
        fields = ("strategy", "seed", "tasks", "recipe", "learning_rate")
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
        return found | {"drift KL": self.drift_kl[-1], "drift NLL": self.drift_nll[-1], "seconds": self.train_seconds}

    def summary(self) -> str:
        """One line."""
        return f"{self.strategy} seed {self.seed}: " + ", ".join(f"{k} {v:.2f}" for k, v in self.numbers().items())


COLUMNS = ("ACC", "BWT", "FWT", "forgetting", "drift KL", "drift NLL", "seconds")


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
        f"Tasks in their order: {', '.join(first.tasks)}. Learning rate {first.learning_rate:g}, seeds"
        f" {', '.join(map(str, seeds))}; from three seeds on, 95 % bootstrap intervals over seeds stand in brackets."
        " Scores in percent: facts by all answer tokens on paraphrased questions, classification by argmax over the"
        " options. Drift in nats per token on general text that is neither trained on nor rehearsed.",
        "",
        "| strategy | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
        *(f"| {name} | " + " | ".join(_row(cells)) + " |" for name, cells in by_strategy.items()),
        "",
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


def _row(cells: Sequence[Cell]) -> list[str]:
    found = [cell.numbers() for cell in cells]
    return [_interval([numbers[column] for numbers in found if column in numbers], column) for column in COLUMNS]


def _interval(values: Sequence[float], column: str) -> str:
    if not values:
        return "-"
    digits = 3 if column.startswith("drift") else 0 if column == "seconds" else 1
    text = f"{float(np.mean(values)):.{digits}f}"
    if len(values) < 3 or column == "seconds":
        return text
    low, high = bootstrap(values)
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def plot(by_strategy: dict[str, list[Cell]], title: str, docs: Path) -> list[Path]:
    """Heat maps of the mean R with the base row, and ACC and drift over the updates."""
    import matplotlib

    matplotlib.use("Agg")
    sequences = {name: cells for name, cells in by_strategy.items() if cells[0].is_sequence}
    if not sequences:
        return []
    return [_heat_maps(sequences, docs / f"forgetting-{title}-R.png"),
            _curves(sequences, docs / f"forgetting-{title}-curves.png")]  # fmt: skip


def _heat_maps(sequences: dict[str, list[Cell]], path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(sequences), figsize=(3.4 * len(sequences), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (name, cells) in zip(axes[0], sequences.items(), strict=True):
        scores = np.mean([[cell.before, *cell.scores] for cell in cells], axis=0)
        axis.imshow(scores, vmin=0, vmax=1, cmap="viridis")
        axis.set_title(name)
        axis.set_xticks(range(scores.shape[1]), cells[0].tasks, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(scores.shape[0]), ["base", *cells[0].tasks], fontsize=8)
        for (row, column), value in np.ndenumerate(scores):
            colour = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes[0, 0].set_ylabel("after learning")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _curves(sequences: dict[str, list[Cell]], path: Path) -> Path:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, cells in sequences.items():
        updates = range(1, len(cells[0].tasks) + 1)
        seen = np.mean([[np.mean(row[: k + 1]) for k, row in enumerate(cell.scores)] for cell in cells], axis=0)
        left.plot(updates, 100 * seen, marker="o", label=name)
        right.plot(updates, np.mean([cell.drift_kl for cell in cells], axis=0), marker="o", label=name)
    left.set(xlabel="update", ylabel="mean score on the tasks so far, %", ylim=(0, 100))
    right.set(xlabel="update", ylabel="KL(base || model), nats per token", ylim=(0, None))
    for axis in (left, right):
        axis.set_xticks(list(updates))
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
