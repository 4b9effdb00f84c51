"""What is worth telling, as pure functions: a row of the audit log, or a number that has grown."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from daemon.notify.settings import Event

FROM_AUDIT: Mapping[str, Event] = {
    "run.LIVE": "live", "run.REJECTED": "rejected", "run.FAILED": "failed", "run.ROLLED_BACK": "rolled_back",
}  # fmt: skip
"""Rows of the audit log that make a notice."""
_SAID: Mapping[Event, str] = {
    "live": "{0} is live", "rejected": "The gate has turned {0} down", "failed": "{0} has failed",
    "rolled_back": "{0} is rolled back",
    "quarantine": "{1} files or lines of {0} are in the quarantine; see: eternad quarantine ls",
    "review": "{1} feedback records of {0} wait for review; see: eternad review ls",
    "disk": "Too little free space: no update starts; see: eternad gc",
}  # fmt: skip


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to tell. Told again (after a crash, after a failed try) it has the same `id`."""

    id: str
    event: str
    at: float
    subject: str
    """The run, or the model."""
    text: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Which numbers were told of last, and what there is to tell now."""

    marks: dict[str, int]
    notices: list[Notice]


def of_audit(identity: int, at: float, event: str, run_id: str, detail: Mapping[str, Any]) -> Notice:
    """The notice of a run's move. `identity`: of the audit row, which is never used again."""
    kind, reason = FROM_AUDIT[event], str(detail.get("reason", ""))
    said = _SAID[kind].format(f"run {run_id}")
    return Notice(
        id=f"audit-{identity}", event=kind, at=at, subject=run_id, text=f"{said}: {reason}" if reason else said
    )  # fmt: skip


def of_numbers(numbers: Mapping[str, int], marks: Mapping[str, int], step: int, now: float) -> Change:
    """Compare numbers (`quarantine/MODEL`, `review/MODEL`, `disk/`) with those last told of.

    The quarantine is told of each time that it has grown by `step`; review and disk when they stop being 0.
    """
    told, notices = dict(marks), []
    for key, number in numbers.items():
        event, _, model = key.partition("/")
        mark = min(marks.get(key, 0), number)
        needed = step if event == "quarantine" else 1 if not mark else math.inf
        told[key] = mark
        if number - mark >= needed:
            told[key] = number
            notices.append(_grown(event, model, number, now))
    return Change(marks=told, notices=notices)


def _grown(event: str, model: str, number: int, now: float) -> Notice:
    said = _SAID[event].format(model or "no model", number)  # type: ignore[index]  # a key of `numbers` is an event
    return Notice(id=f"{event}-{model}-{number}-{int(now // 3600)}", event=event, at=now, subject=model, text=said)
