"""The rules of trust: `[trust]` for everybody, `[trust.sources.NAME]` for one directory of feedback.

A record can never say how far it is to be believed: the directory it was dropped in does, and the numbers here.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from strategies.catalog import Count, NotNegative

Personal = Literal["email", "phone", "iban", "credit_card", "ip"]
Whole = Annotated[int, msgspec.Meta(ge=0)]
DAY_SECONDS = 86400.0


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source of feedback, `feedback/MODEL/NAME/`: keys given here count in the place of those of `[trust]`."""

    trusted: bool = False
    """Only staff write to it: its demonstrations are learned, and no cap, probation or likeness holds its records."""
    examples_per_subject_day: Count | None = None
    require_consent: bool | None = None
    probation_seconds: NotNegative | None = None
    probation_subjects: Count | None = None
    likeness_max: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    drift_records_min: Whole | None = None
    redact: list[Personal] | None = None


class Trust(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far feedback is believed: by the directory it was dropped in, never by what it claims."""

    examples_per_subject_day: Count = 20
    """So many records of one subject are learned from within 24 hours; further ones wait for review."""
    subject_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.01
    """One subject gives at most this share of an update's new examples (at least one); the rest waits for the next."""
    free_text_from: list[str] = []
    """Sources whose demonstrations are learned without review (`*`: all). Name only those that staff write to."""
    require_consent: bool = False
    """Records without `consent` wait for review."""
    probation_seconds: NotNegative = DAY_SECONDS
    """A subject is new for so long after its first record; 0: nobody is new."""
    probation_subjects: Count = 3
    """What a new subject says waits until so many subjects have said the like, over `probation_seconds` or more."""
    likeness_max: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    """Answers that are more alike than this (Jaccard, runs of 5 characters) count once; 1: only equal ones do."""
    drift_records_min: Whole = 50
    """A batch is compared with the past of its source once there are so many records of each; 0: never."""
    association_records_min: Whole = 4
    """Before an update: a phrase in questions and words in answers that so many records put together, few others use
    and no writer has said, look like a backdoor and are held; 0: never."""
    blocklist_file: Path | None = None
    """Words, `/patterns/` and subjects, one a line, that hold a record back; read again whenever it changes."""
    redact: list[Personal] = msgspec.field(default_factory=lambda: ["email", "phone", "iban", "credit_card", "ip"])
    """Personal data that is taken out of feedback before anything of it is stored."""
    sources: dict[str, Source] = {}


def rules_of(trust: Trust, source: str) -> Trust:
    """The rules for one source."""
    return _merged(trust, trust.sources.get(source))


def _merged(trust: Trust, own: Source | None) -> Trust:
    if own is None:
        return trust
    given: dict[str, Any] = {
        name: value for name in own.__struct_fields__ if name != "trusted" and (value := getattr(own, name)) is not None
    }
    return msgspec.structs.replace(trust, **given)


def is_trusted(trust: Trust, source: str) -> bool:
    """Whether only staff write to a source."""
    own = trust.sources.get(source)
    return own is not None and own.trusted


def trusted_sources(trust: Trust) -> list[str]:
    """The sources that only staff write to; content, which has no source, is always trusted."""
    return sorted(name for name, own in trust.sources.items() if own.trusted)
