"""Which model a dropped file is for: said by the directory, never by the file.

content/MODEL/COLLECTION/...     eval/MODEL/...     feedback/MODEL/SOURCE/*.jsonl
"""

import difflib
from collections.abc import Iterable
from typing import Literal

import msgspec

from daemon.config import NAME
from daemon.ingest.problem import Problem

Area = Literal["content", "eval", "feedback"]
LAYOUT = "content/MODEL/COLLECTION/FILE, eval/MODEL/FILE or feedback/MODEL/SOURCE/FILE.jsonl"


class Place(msgspec.Struct, frozen=True):
    """Where a file was dropped."""

    area: Area
    model: str
    collection: str
    """Sub-directories below the model, joined by `/`."""
    source: str
    """Feedback: the first of them, which decides how far its records are trusted."""
    name: str


def place_of(path: str, models: Iterable[str]) -> Place:
    """Read the place out of a path below the library directory; raises `Problem` for one that has none."""
    area, _, rest = path.partition("/")
    if area not in ("content", "eval", "feedback"):
        raise _misplaced(path, f"`{area}` is no place for files")
    model, slash, below = rest.partition("/")
    if not slash:
        raise _misplaced(path, "it names no model")
    _check_model(path, model, sorted(models))
    directories, _, name = below.rpartition("/")
    if area == "feedback" and not NAME.fullmatch(directories.partition("/")[0]):
        raise _misplaced(path, f"a feedback file needs a source directory whose name matches {NAME.pattern}")
    source = directories.partition("/")[0] if area == "feedback" else ""
    return Place(area, model, directories, source, name)  # type: ignore[arg-type]


def _check_model(path: str, model: str, models: list[str]) -> None:
    if model in models:
        return
    nearest = difflib.get_close_matches(model, models, 1, 0.5)
    hint = f"did you mean `{nearest[0]}`? " if nearest else ""
    raise Problem(
        "unknown_model",
        f"{path}: there is no model `{model}`; {hint}Known models: {', '.join(models)}. Move the file, or add"
        f" [models.{model}] to the configuration and retry",
        stage="place", retryable=True,
    )  # fmt: skip


def _misplaced(path: str, why: str) -> Problem:
    return Problem("misplaced", f"{path}: {why}. Drop files as {LAYOUT}", stage="place", retryable=True)
