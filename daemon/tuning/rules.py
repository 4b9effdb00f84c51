"""How a model's settings are searched, and when by itself: the table `[models.NAME.tuning]` and a pure decision."""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from strategies.catalog import Count, Positive


class Tuning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The search for better settings: of `eternad tune`, and of the daemon itself where a trigger is set."""

    engine: Literal["optuna", "ray"] = "optuna"
    """Where trials are trained: in processes of this machine, or on a Ray cluster."""
    sampler: Literal["grid", "random", "tpe", "gp"] = "tpe"
    """How settings are proposed; `gp` needs scipy."""
    trials: Count = 30
    """In all; a search that was stopped goes on."""
    jobs: Count = 1
    """Trials at a time; each takes the model's `threads`."""
    updates: Annotated[int, msgspec.Meta(ge=3)] = 6
    """So many of the latest updates are played again."""
    held_out: Count = 2
    """The last ones of them are not searched on: there the best trial must beat what is configured. At least two
    stay to search on, since nothing can be forgotten before the second."""
    after_rejected: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The daemon searches by itself after so many candidates were rejected in a row; 0: never."""
    interval_seconds: Positive | None = None
    """The daemon searches by itself so long after the search before, if the model has learned something since."""
    policy: Literal["ask", "apply"] = "ask"
    """Of a search that the daemon began: `ask` leaves a difference that `eternad tune NAME --accept` takes over,
    `apply` writes it. Either way the next candidate must pass the gate."""
    searches_kept: Count = 3
    """Directories of older searches are removed."""


class Ended(msgspec.Struct, frozen=True):
    """A run that is at its end."""

    state: str
    at: float


def is_due(rules: Tuning, ended: Sequence[Ended], searched_at: float, now: float) -> str | None:
    """Why a search should begin now (`rejected`, `interval`), or None. `ended`: runs, newest first."""
    since = [run for run in ended if run.at > searched_at]
    states = [run.state for run in since[: rules.after_rejected]]
    if rules.after_rejected and states == ["REJECTED"] * rules.after_rejected:
        return "rejected"
    if rules.interval_seconds is None or not since:
        return None
    # a clock that was set back must not postpone the search for as long as it was wrong: a distance counts
    return "interval" if abs(now - searched_at) >= rules.interval_seconds else None
