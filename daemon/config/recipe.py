"""What a first configuration trains with, by the size of its base model; the measurements are in docs/strategies.md."""

import json
import math
from pathlib import Path
from typing import NamedTuple

SMALL = 1_500_000_000
"""Parameters. Measured at 135 million; what is far larger takes the rate of the literature."""
LARGEST_HEADER = 100_000_000
"""Bytes, as the format itself allows."""
RECIPE = ("replay", "distill")
"""The strategies that are switched on, with their own defaults."""


class Pace(NamedTuple):
    """Keys of `[models.NAME.training]`."""

    learning_rate: float
    epochs: int
    batch_examples: int


def pace_for(base: Path) -> Pace:
    """The larger a model, the gentler: it needs less, and forgets less by it. A base that is not there yet is small."""
    return Pace(9e-4, 4, 4) if parameters_of(base) <= SMALL else Pace(1e-4, 3, 8)


def parameters_of(base: Path) -> int:
    """How many parameters the safetensors files of a model directory have, by their headers alone; 0 without any.

    What is no such file counts nothing: a base that cannot be read is for `check-config` and the trainer to refuse.
    """
    return sum(_parameters(path) for path in base.glob("*.safetensors"))


def _parameters(path: Path) -> int:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), LARGEST_HEADER)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0
