"""Feedback records into the journal, whether they came in a file or over the socket."""

import hashlib
from collections.abc import Collection, Iterable, Iterator

import msgspec

from buffers import journal
from buffers.example import Example, Origin
from daemon.config import Config
from daemon.ingest import decontaminate, feedback, strict_json, trust
from daemon.ingest.kinship import Kin
from daemon.ingest.lines import Line
from daemon.ingest.outcome import Outcome
from daemon.ingest.place import Place
from daemon.ingest.problem import Problem
from daemon.ingest.ratings import Ratings
from daemon.ingest.refuse import BadLine, note_lines
from daemon.ingest.trust import Doubt
from daemon.state import eval_grams, ratings, records, subjects
from daemon.state.database import Connection
from daemon.state.records import RecordRow
from daemon.trust import personal
from daemon.trust.policy import Personal


class Ready(msgspec.Struct, frozen=True, gc=False):
    """A record that is in order, with what can be learned from it."""

    line: Line
    identity: str
    record: feedback.Record
    examples: list[Example]
    body: bytes
    """Canonical JSON, without the personal data that was found in it."""
    sha256: str
    """Of the record as it came."""


def parse_lines(
    batch: list[Line], model: str, redacted: Collection[Personal] = ()
) -> tuple[list[Ready], list[BadLine]]:
    """Sort lines into records that are in order and lines that are not; blank lines are neither."""
    ready: list[Ready] = []
    bad: list[BadLine] = []
    for line in batch:
        try:
            if line.body is None:
                raise Problem("line_too_long", "the line is longer than watch.line_bytes_max and was skipped")
            if line.body.strip():
                ready.append(_ready(line, line.body, model, redacted))
        except Problem as problem:
            bad.append(BadLine(line, problem))
    return ready, bad


def _ready(line: Line, body: bytes, model: str, redacted: Collection[Personal]) -> Ready:
    tree, canonical = strict_json.parse_canonical(body)
    record = feedback.read(tree, model)
    digest = hashlib.sha256(canonical).hexdigest()
    clean = personal.redact_tree(tree, redacted)
    if clean is not tree:
        record, canonical = feedback.read(clean, model), msgspec.json.encode(clean, order="deterministic")
    return Ready(line, feedback.identity(record), record, feedback.examples_of(record), canonical, digest)


def store(
    connection: Connection, config: Config, place: Place, path: str, ready: list[Ready], bad: list[BadLine], now: float
) -> Outcome:
    """Store parsed records and note bad lines, inside the caller's transaction; conflicts are added to `bad`."""
    outcome = Outcome(path=path, model=place.model)
    ready = _not_erased(connection, ready, bad)
    fresh = list(_fresh(connection, place.model, ready, bad, outcome))
    numbers = Ratings(connection, config.metrics, place.model, [each.record for each in fresh])
    fresh = [each for each in fresh if _fits(numbers, each, bad)]
    withdrawn = records.retractions_of(connection, place.model, (each.identity for each in fresh))
    has_eval = not eval_grams.is_empty(connection, place.model)
    why_not = {each.identity: _why_not(each, withdrawn, now) for each in fresh}
    fresh, partners = _rated(numbers, fresh, why_not)
    for each in fresh if has_eval else []:
        if any(eval_grams.meets(connection, place.model, decontaminate.grams(example)) for example in each.examples):
            why_not[each.identity] = why_not[each.identity] or "it stands in eval/"
    candidates = [each for each in fresh if each.examples and not why_not[each.identity]]
    kin = Kin(connection, place.model)
    doubts = trust.doubts(connection, config.trust, kin, place.source, candidates, now)
    learned = [each for each in candidates if each.identity not in doubts]
    added = journal.add(
        connection, place.model, _items(learned, place, path), heldout_fraction=config.watch.heldout_fraction, now=now,
        kin=kin,
    )  # fmt: skip
    ids = iter(added.ids)
    in_journal = {each.identity: [next(ids) for _ in each.examples] for each in learned}
    rows = (
        _row(each, place, why_not[each.identity], doubts.get(each.identity), in_journal.get(each.identity, []))
        for each in fresh
    )
    records.add(connection, rows, now)
    for identity, partner in partners.items():
        if identity in in_journal:
            ratings.pair(connection, place.model, partner, in_journal[identity][0])
    outcome.retracted = sum(_retract(connection, place.model, each, bad) for each in fresh)
    note_lines(connection, path, bad, now)
    outcome.new, outcome.duplicates, outcome.heldout = added.new, added.duplicates, added.heldout
    outcome.records, outcome.bad_lines = len(fresh), len(bad)
    outcome.held = sum(doubt.state == "held" for doubt in doubts.values())
    return outcome


def _not_erased(connection: Connection, ready: list[Ready], bad: list[BadLine]) -> list[Ready]:
    """Refuse what comes from subjects that were erased; nothing of such a line is kept."""
    erased = subjects.buried(connection, {each.record.subject.id for each in ready})
    if not erased:
        return ready
    message = "its subject was erased: nothing of it is taken in again"
    for each in ready:
        if each.record.subject.id in erased:
            line = msgspec.structs.replace(each.line, body=None)
            bad.append(BadLine(line, Problem("erased_subject", message, stage="trust")))
    return [each for each in ready if each.record.subject.id not in erased]


def _fresh(
    connection: Connection, model: str, ready: list[Ready], bad: list[BadLine], outcome: Outcome
) -> Iterator[Ready]:
    """Those whose id is new; the same body again is only counted, another body under the same id is a conflict."""
    known = records.known_bodies(connection, model, (each.identity for each in ready))
    for each in ready:
        before = known.get(each.identity)
        if before is None:
            known[each.identity] = each.sha256
            yield each
        elif before == each.sha256:
            outcome.repeated += 1
        else:
            message = f"the id {each.identity} is taken by a record with another body; the first one counts"
            bad.append(BadLine(each.line, Problem("id_conflict", message)))


def _fits(numbers: Ratings, ready: Ready, bad: list[BadLine]) -> bool:
    """Whether a record fits the metric that it names; if not, its line is refused."""
    try:
        numbers.check(ready.record)
    except Problem as problem:
        bad.append(BadLine(ready.line, problem))
        return False
    return True


def _rated(
    numbers: Ratings, fresh: list[Ready], why_not: dict[str, str]
) -> tuple[list[Ready], dict[str, str]]:  # fmt: skip
    """The records with what floats among them teach, and `{id: id of the rating that it is compared with}`."""
    rated, partners = list[Ready](), dict[str, str]()
    for each in fresh:
        taught = numbers.taught(each.identity, each.record, counts=not why_not[each.identity])
        rated.append(msgspec.structs.replace(each, examples=taught.examples) if taught.examples else each)
        if taught.partner:
            partners[each.identity] = taught.partner
    return rated, partners


def _why_not(ready: Ready, withdrawn: dict[str, str], now: float) -> str:
    """Why a record is not learned from, or an empty string."""
    consent = ready.record.consent
    if withdrawn.get(ready.identity) == ready.record.subject.id:
        return "withdrawn before it came"
    if consent is None:
        return ""
    if "train" not in consent.scope:
        return "no consent to training"
    return "consent expired" if consent.expires is not None and consent.expires.timestamp() <= now else ""


def _until(consent: feedback.Consent | None) -> float | None:
    return None if consent is None or consent.expires is None else consent.expires.timestamp()


def _items(learned: Iterable[Ready], place: Place, path: str) -> Iterator[tuple[Example, Origin]]:
    for each in learned:
        origin = Origin(
            file=path, line=each.line.number, collection=place.collection, source=place.source,
            subject=each.record.subject.id, record_id=each.identity,
        )  # fmt: skip
        for example in each.examples:
            yield example, origin


def _row(ready: Ready, place: Place, why_not: str, doubt: Doubt | None, ids: list[int]) -> RecordRow:
    record = ready.record
    state = "journal" if ids else doubt.state if doubt else "stored"
    why = why_not or (doubt.reason if doubt else "")
    return RecordRow(
        model=place.model, id=ready.identity, kind=record.kind, source=place.source, subject=record.subject.id,
        body_sha256=ready.sha256, body=ready.body,
        state="retracted" if why_not.startswith("withdrawn") else state,
        reason=feedback.withdrawn(record) if record.kind == "retraction" else why,
        example_id=ids[0] if ids else None, pair_id=ids[1] if len(ids) > 1 else None,
        code=doubt.code if doubt else "",
        consent_until=_until(record.consent),
    )  # fmt: skip


def _retract(connection: Connection, model: str, ready: Ready, bad: list[BadLine]) -> int:
    """Carry out a retraction: only the subject of a record may withdraw it."""
    if ready.record.kind != "retraction":
        return 0
    target = records.get(connection, model, feedback.withdrawn(ready.record))
    if target is None or target.state == "retracted":
        return 0
    if target.subject != ready.record.subject.id:
        message = f"the record {target.id} is another subject's: only its own subject may withdraw it"
        bad.append(BadLine(ready.line, Problem("foreign_retraction", message)))
        return 0
    return records.retract(connection, target, f"withdrawn by {ready.identity}")
