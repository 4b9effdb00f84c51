"""Float feedback: what a number says about an answer, by `[metrics.NAME]` and by what its subject gave before.

A pair is made of two ratings of one subject: whoever withdraws or erases takes the whole pair along, and nobody's
rating can be turned against what somebody else saw.
"""

from collections.abc import Mapping, Sequence

import msgspec

from buffers.example import Example, Message
from daemon.ingest.feedback import Record, read
from daemon.ingest.problem import Problem
from daemon.ingest.rows import compare, from_conversation
from daemon.state import ratings
from daemon.state.database import Connection
from daemon.trust.metric import PAST_MAX, Metric, label_of, refusal, score_of


class Taught(msgspec.Struct, frozen=True):
    """What can be learned from one rating."""

    examples: list[Example] = []
    partner: str = ""
    """The record that it is compared with."""


class _Rating(msgspec.Struct):
    """One rating of a subject."""

    identity: str
    metric: str
    value: float
    asked: tuple[Message, ...]
    answer: tuple[Message, ...]
    is_free: bool


def check(metrics: Mapping[str, Metric], record: Record) -> None:
    """Raise `Problem` for a record that does not fit the metric that it names."""
    metric = metrics.get(record.metric or "")
    why = None if metric is None else refusal(metric, record.kind, record.value)
    if why is not None:
        raise Problem("metric_mismatch", f"metric `{record.metric}`: {why}", retryable=True)


class Ratings:
    """The float records of one batch, in their order: each is judged by those of its subject before it."""

    def __init__(
        self, connection: Connection, metrics: Mapping[str, Metric], model: str, records: Sequence[Record]
    ) -> None:
        self._metrics = metrics
        subjects = {each.subject.id for each in records if each.kind == "float"}
        stored = ratings.past(connection, model, subjects, PAST_MAX) if metrics and subjects else {}
        self._known = {
            subject: [_rating(each.id, read(msgspec.json.decode(each.body), model), each.is_free) for each in found]
            for subject, found in stored.items()
        }

    def check(self, record: Record) -> None:
        """Raise `Problem` for a record that does not fit the metric that it names."""
        check(self._metrics, record)

    def taught(self, identity: str, record: Record, *, counts: bool = True) -> Taught:
        """What a float record teaches; nothing without its metric in the configuration.

        `counts`: whether it may be learned from at all; if not, it still says how its subject uses the scale.
        """
        metric = self._metrics.get(record.metric or "")
        if record.kind != "float" or metric is None:
            return Taught()
        known = self._known.setdefault(record.subject.id, [])
        same = [each for each in known if each.metric == record.metric and each.identity != identity]
        past = [each.value for each in same][-PAST_MAX:]
        own = _rating(identity, record, is_free=counts)
        if own.identity not in {each.identity for each in known}:
            known.append(own)
        if not counts or not own.answer or metric.learn == "nothing":
            return Taught()
        return _rated(metric, own, past) if metric.learn == "ratings" else _paired(metric, own, same, past)


def _rating(identity: str, record: Record, is_free: bool) -> _Rating:
    asked = record.input.messages if record.input is not None else ()
    answer = record.output.messages if record.output is not None else ()
    return _Rating(identity, record.metric or "", float(record.value), asked, answer, is_free)


def _rated(metric: Metric, own: _Rating, past: Sequence[float]) -> Taught:
    label = label_of(metric, score_of(metric, own.value, past))
    return Taught() if label is None else Taught([from_conversation((*own.asked, *own.answer), label)])


def _paired(metric: Metric, own: _Rating, same: Sequence[_Rating], past: Sequence[float]) -> Taught:
    """Against the rating of another answer to the same prompt that lies farthest away and is in no pair yet."""
    z = score_of(metric, own.value, past)
    apart = {
        each.identity: z - score_of(metric, each.value, past)
        for each in same if each.is_free and each.asked == own.asked and each.answer != own.answer and each.answer
    }  # fmt: skip
    partner = max(
        (each for each in same if each.identity in apart), key=lambda each: abs(apart[each.identity]), default=None
    )
    if partner is None or abs(apart[partner.identity]) < metric.difference:
        return Taught()
    partner.is_free = own.is_free = False
    better, worse = (own, partner) if apart[partner.identity] > 0 else (partner, own)
    return Taught([compare((*own.asked, *better.answer), (*own.asked, *worse.answer))], partner.identity)
