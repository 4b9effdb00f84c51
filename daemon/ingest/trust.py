"""How far feedback is believed. Players are many, anonymous and sometimes hostile: caps are absolute numbers.

About 250 poisoned documents were enough to put a backdoor into models of 600 M to 13 B parameters whatever the size
of the rest (Souly et al., arXiv:2510.07192), and an update sees far fewer examples than a pre-training.
"""

from collections.abc import Iterable
from typing import Protocol

from daemon.config import Trust
from daemon.ingest.feedback import Record

DAY_SECONDS = 86400.0


class Judged(Protocol):
    """A record with its id in the form in which it is compared."""

    @property
    def identity(self) -> str:
        """The record's id."""

    @property
    def record(self) -> Record:
        """The record."""


def why_held(trust: Trust, source: str, candidates: Iterable[Judged], learned: dict[str, int]) -> dict[str, str]:
    """`{id: reason}` of the records that must wait for review; the others are learned from.

    `learned`: how many records of each subject have been learned from within the last day. Whatever the reason, the
    subject of a held record does not use up its share with it.
    """
    held: dict[str, str] = {}
    spent = dict(learned)
    for each in candidates:
        subject = each.record.subject.id
        reason = _why_held(trust, source, each.record, spent.get(subject, 0))
        if reason:
            held[each.identity] = reason
        else:
            spent[subject] = spent.get(subject, 0) + 1
    return held


def _why_held(trust: Trust, source: str, record: Record, spent: int) -> str:
    if trust.require_consent and record.consent is None:
        return "no consent given"
    is_free_text = record.kind == "demonstration"
    if is_free_text and "*" not in trust.free_text_from and source not in trust.free_text_from:
        return f"free text from the source `{source}`, which is not in trust.free_text_from"
    if spent >= trust.examples_per_subject_day:
        return f"more than {trust.examples_per_subject_day} records of its subject in a day"
    return ""
