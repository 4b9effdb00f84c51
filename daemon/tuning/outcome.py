"""What a search found, for people and scripts: `result.json` and its pictures beside the study."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from markupsafe import Markup

from daemon.config import Model
from daemon.tuning.replays import Comparison
from daemon.web import charts
from strategies.request import write
from strategies.search import Trial, front
from strategies.space import Parameter, Settings, Value, values_of

STYLE = (
    "<style>text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.line{fill:none;stroke-width:2}"
    ".line.series-0{stroke:#3366cc}.line.series-1{stroke:#dc3912}.dot.series-0{fill:#3366cc}.dot.series-1{fill:#dc3912}"
    "</style>"
)
"""What the status page's style sheet says of its charts, for a file that stands alone."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`result.json`."""

    format: str = "eternad.tuning/1"
    model: str
    sampler: str
    updates: list[int]
    """Past updates that were played again; `comparison` names those that were held out."""
    space: list[Parameter]
    trials: list[Trial]
    best: int | None
    """Number of the best trial."""
    front: list[int]
    """Numbers of the trials that no other beats in gain, rise and drift at once."""
    importance: dict[str, float]
    comparison: Comparison | None
    """None when what is configured was best already."""
    changes: dict[str, Value]
    """What to change in the configuration; empty when the held-out updates speak against it."""
    difference: str = ""


def latest(state_directory: Path, model: str) -> Result | None:
    """What the latest search of a model has found; None before the first has ended."""
    found = sorted((state_directory / "tuning" / model).glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    try:
        return msgspec.json.decode(found[-1].read_bytes(), type=Result) if found else None
    except (OSError, msgspec.DecodeError):  # removed meanwhile, or of an older release
        return None


def open_changes(model: Model, result: Result) -> dict[str, Value]:
    """Those of the proposed changes that the configuration does not say yet; empty when a strategy is gone."""
    settings = Settings(lora=model.lora, training=model.training, strategies=list(model.strategy))
    try:
        now = values_of(settings, list(result.changes))
    except KeyError:
        return {}
    return {name: value for name, value in result.changes.items() if now[name] != value}


def pictures(result: Result) -> dict[str, Markup]:
    """Title -> chart, for the page; empty ones where there is nothing to draw."""
    return {
        "History": _history(result.trials), "Importance": _importance(result.importance),
        "Pareto front": _front(result.trials),
    }  # fmt: skip


def keep(directory: Path, result: Result) -> list[Path]:
    """Write the result and its pictures; returns the files."""
    write(directory / "result.json", result)
    names = dict(zip(pictures(result), ("history.svg", "importance.svg", "front.svg"), strict=True))
    for title, picture in pictures(result).items():
        (directory / names[title]).write_text(_alone(picture), "utf-8")
    return [directory / name for name in ("result.json", *names.values())]


def _history(trials: Sequence[Trial]) -> Markup:
    scored = [(trial.number, trial.value) for trial in trials if trial.value is not None]
    best = [(float(number), max(value for _, value in scored[: place + 1])) for place, (number, _) in enumerate(scored)]
    series: dict[str, charts.Series] = {
        "each trial": [(float(number), value) for number, value in scored],
        "best so far": best,
    }
    return charts.lines("History", series, "trial", "gain - rise - drift (weighted, nats per token)")


def _front(trials: Sequence[Trial]) -> Markup:
    found = sorted((trial.score.rise, trial.score.gain) for trial in front(trials) if trial.score is not None)
    return charts.lines("Pareto front", {"front": found}, "rise on the old", "gain on the new")


def _importance(shares: Mapping[str, float]) -> Markup:
    return charts.bars("Importance", sorted(shares.items(), key=lambda pair: -pair[1]))


def _alone(picture: Markup) -> str:
    """An SVG of a page as a file of its own; an empty one where there was nothing to draw."""
    drawing = str(picture) or "<svg><title>nothing yet</title></svg>"
    start = drawing.index(">") + 1
    return drawing[:start].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + STYLE + drawing[start:]
