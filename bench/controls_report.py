"""The table of `bench.controls`."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One control, one seed."""

    control: str
    seed: int
    setting: str
    """All that decides the result, so that a cell of another setting is not taken for this one."""
    recall: float = 0.0
    """Share of the differently worded questions that are answered in full."""
    loss_asked: float = 0.0
    """Nats per token of the answers to them."""
    loss_trained: float = 0.0
    """On the rows that were trained."""
    drift_kl: float = 0.0
    """KL(base || model) on general text, nats per token."""
    epochs: float = 0.0
    derived: int = 0

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.control} seed {self.seed}: recall {100 * self.recall:.1f}, loss asked {self.loss_asked:.2f},"
            f" trained {self.loss_trained:.3f}, drift {self.drift_kl:.2f}, epochs {self.epochs:.1f}"
        )


COLUMNS = {
    "recall, %": ("recall", 100.0, 1), "loss, asked otherwise": ("loss_asked", 1.0, 2),
    "loss, trained rows": ("loss_trained", 1.0, 3), "drift KL": ("drift_kl", 1.0, 2), "epochs": ("epochs", 1.0, 1),
}  # fmt: skip


def write_report(cells: Sequence[Cell], facts: int, epochs: int, docs: Path) -> Path:
    """`docs/controls.md`; returns the page."""
    page = docs / "controls.md"
    docs.mkdir(parents=True, exist_ok=True)
    page.write_text(text_of(cells, facts, epochs), "utf-8")
    return page


def text_of(cells: Sequence[Cell], facts: int, epochs: int) -> str:
    """The page."""
    seeds = sorted({cell.seed for cell in cells})
    rows = [
        f"| {name} | " + " | ".join(_value(own, *column) for column in COLUMNS.values()) + " |"
        for name, own in by_control(cells).items()
    ]
    return "\n".join([
        "# Controls against overfitting",
        "",
        f"One update of {facts} invented facts, each in a single wording, {epochs} epochs' worth of rows whatever the"
        f" control makes of them (but where a control names its epochs), no replay; {_of(seeds)}. Recall and loss are"
        " on questions worded like none of the trained ones (loss in nats per token of the answers), drift on general"
        " text. The teacher of `paraphrases` and `questions` knows the lore: one that is always right.",
        "",
        "| control | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
        *rows,
        "",
        "Made by `make bench-controls` (`python -m bench.controls`).",
    ]) + "\n"  # fmt: skip


def _of(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]} alone"
    return f"mean of seeds {', '.join(map(str, seeds))}, smallest and largest in brackets"


def by_control(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """In the order in which they came."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.control, []).append(cell)
    return found


def _value(cells: Sequence[Cell], field: str, scale: float, digits: int) -> str:
    values = [scale * getattr(cell, field) for cell in cells]
    text = f"{float(np.mean(values)):.{digits}f}"
    return text if len(values) == 1 else f"{text} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
