"""How far feedback is believed. Players are many, anonymous and sometimes hostile: caps are absolute numbers.

About 250 poisoned documents were enough to put a backdoor into models of 600 M to 13 B parameters whatever the size
of the rest (Souly et al., arXiv:2510.07192), and an update sees far fewer examples than a pre-training.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec

from buffers.example import Example
from daemon.ingest.feedback import Record, examples_of, read
from daemon.ingest.kinship import Kin, Text, teaches
from daemon.state import records, standing
from daemon.state.database import Connection
from daemon.state.likeness import COMPARED_MAX, SUPPORTERS_MAX, Waiting
from daemon.trust import blocklist, drift
from daemon.trust.drift import Saying
from daemon.trust.likeness import asked
from daemon.trust.policy import DAY_SECONDS, Trust, is_trusted, rules_of

RECENT_SECONDS = 3600.0
"""What a source has said within the last hour counts with a batch: a flood may come in drops."""


class Judged(Protocol):
    """A record with its id in the form in which it is compared, and what can be learned from it."""

    @property
    def identity(self) -> str:
        """The record's id."""

    @property
    def record(self) -> Record:
        """The record."""

    @property
    def examples(self) -> list[Example]:
        """What would be learned."""


class Doubt(msgspec.Struct, frozen=True):
    """Why a record is not learned from now."""

    code: str
    reason: str
    state: str = "held"
    """`held` waits for review; `stored` needs none: somebody has said the same before."""


def doubts(
    connection: Connection, trust: Trust, kin: Kin, source: str, candidates: Sequence[Judged], now: float
) -> dict[str, Doubt]:
    """`{id: doubt}` of the records that are not learned from now; the others are.

    Runs inside the transaction that stores them. Whatever the doubt, the subject of such a record does not use up its
    share with it. Raises `BadBlocklist`.
    """
    judge = _Judge(connection, trust, kin, source, candidates, now)
    found = {each.identity: doubt for each in candidates if (doubt := judge.doubt(each)) is not None}
    believed = [each for each in candidates if each.identity not in found]
    return found if judge.is_trusted else found | judge.drifting(believed)


class _Entry(NamedTuple):
    """A record of the batch that is learned from."""

    text: Text
    example: Example
    identity: str


class _Judge:
    """One batch of one source, record by record: what the earlier ones of it said counts for the later ones."""

    def __init__(
        self, connection: Connection, trust: Trust, kin: Kin, source: str, candidates: Sequence[Judged], now: float
    ) -> None:
        self._connection, self._source, self._now = connection, source, now
        self._rules, self.is_trusted = rules_of(trust, source), is_trusted(trust, source)
        self._blocked = blocklist.load(trust.blocklist_file)
        self._kin = kin
        subjects = {each.record.subject.id for each in candidates}
        self._spent = records.learned_since(connection, subjects, now - DAY_SECONDS)
        self._known = standing.known_since(connection, subjects)
        self._batch: dict[int, list[_Entry]] = {}
        """By band."""
        self._asked: dict[tuple[str, tuple[str, bool | None]], list[Waiting]] = {}
        self._heard: dict[str, Example | None] = {}
        """What waiting records say."""
        if not self.is_trusted and self._rules.likeness_max < 1:
            kin.expect(each.examples[0] for each in candidates)
            kin.expect_waiting(each.examples[0] for each in candidates if self._is_new(each.record.subject.id))

    def doubt(self, each: Judged) -> Doubt | None:
        """Why one record is not learned from now, or None."""
        subject = each.record.subject.id
        found = self._by_rules(each) or (None if self.is_trusted else self._by_others(each, subject))
        if found is None:
            self._spent[subject] = self._spent.get(subject, 0) + 1
        return found

    def _by_rules(self, each: Judged) -> Doubt | None:
        rules, record = self._rules, each.record
        if rules.require_consent and record.consent is None:
            return Doubt("consent", "no consent given")
        if why := self._blocked.why(record.subject.id, [text for one in each.examples for text in _texts(one)]):
            return Doubt("blocked", why)
        if self.is_trusted:
            return None
        if record.kind == "demonstration" and not {"*", self._source} & set(rules.free_text_from):
            return Doubt(
                "free_text", f"free text from the source `{self._source}`, which is not in trust.free_text_from"
            )
        if self._spent.get(record.subject.id, 0) >= rules.examples_per_subject_day:
            return Doubt("subject_cap", f"more than {rules.examples_per_subject_day} records of its subject in a day")
        return None

    def _by_others(self, each: Judged, subject: str) -> Doubt | None:
        """What others have said: the like counts once, and a newcomer is believed when several say it."""
        example, least = each.examples[0], self._rules.likeness_max
        told = self._kin.told(example, least) if least < 1 else None
        if told is not None:
            return Doubt("alike", f"it says what the example {told.id} says", "stored")
        learned = self._learned_in_batch(example, least) if least < 1 else None
        if learned is not None:
            return Doubt("alike", f"it says what the record {learned.identity} says", "stored")
        doubt = self._probation(each, subject)
        if doubt is None:
            entry = _Entry(self._kin.text(example), example, each.identity)
            for key in entry.text.keys:
                self._batch.setdefault(key, []).append(entry)
        return doubt

    def _learned_in_batch(self, example: Example, least: float) -> "_Entry | None":
        """An earlier record of the batch that says nearly the same, and is not in the journal yet."""
        text = self._kin.text(example)
        met = {each.identity: each for key in text.keys for each in self._batch.get(key, [])[-COMPARED_MAX:]}
        alike = [each for each in met.values() if text.likeness(each.text) >= least]
        if any(each.example == example for each in alike):
            return None
        return next((each for each in alike if teaches(each.example) == teaches(example)), None)

    def _probation(self, each: Judged, subject: str) -> Doubt | None:
        rules, now = self._rules, self._now
        if not self._is_new(subject):
            return None
        waiting = self._waiting(each.examples[0])
        others = {other.subject for other in waiting}
        supporters = len(others | {subject})
        first = min((other.ingested_at for other in waiting), default=now)
        if supporters >= rules.probation_subjects and now - first >= rules.probation_seconds:
            return None
        if subject not in others and len(waiting) < SUPPORTERS_MAX:
            self._kin.wait(each.examples[0], each.identity)
        return Doubt("probation", f"its subject is new, and {supporters} of {rules.probation_subjects} say the like")

    def _is_new(self, subject: str) -> bool:
        return self._now - self._known.get(subject, self._now) < self._rules.probation_seconds

    def _waiting(self, example: Example) -> list[Waiting]:
        """Records in probation that say the like; a flood asks the same again and again."""
        key = (self._kin.text(example).said, teaches(example))
        if key not in self._asked:
            found = self._kin.waiting(example) if self._rules.likeness_max < 1 else []
            self._asked[key] = [each for each in found if self._is_alike(each, example)]
        return self._asked[key]

    def _is_alike(self, waiting: Waiting, example: Example) -> bool:
        if waiting.id not in self._heard:
            # what a float says depends on its subject's others: in probation it vouches for nobody
            said = examples_of(read(msgspec.json.decode(waiting.body), self._kin.model))[:1]
            self._heard[waiting.id] = said[0] if said else None
        other, least = self._heard[waiting.id], self._rules.likeness_max
        return other is not None and teaches(other) == teaches(example) and self._kin.likeness(example, other) >= least

    def drifting(self, believed: Sequence[Judged]) -> dict[str, Doubt]:
        """Those of a batch that must wait because it is unlike the past of its source."""
        since, model = self._now - RECENT_SECONDS, self._kin.model
        if not believed or not self._rules.drift_records_min:
            return {}
        recent = standing.sayings(self._connection, model, self._source, since, self._now)
        past = standing.sayings(self._connection, model, self._source, 0.0, since)
        reasons = drift.why_drifting(
            [_saying(each.examples[0], each.record.subject.id) for each in believed],
            [_saying(*each) for each in recent], [_saying(*each) for each in past], self._rules.drift_records_min,
        )  # fmt: skip
        return {each.identity: Doubt("drift", reason) for each, reason in zip(believed, reasons, strict=True) if reason}


def _saying(example: Example, subject: str) -> Saying:
    return Saying(example.completion, example.label, subject)


def _texts(example: Example) -> Iterator[str]:
    yield asked(example)
    yield example.completion
    if example.rejected is not None:
        yield example.rejected
