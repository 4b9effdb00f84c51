"""Feedback: strict records, files that grow, rotate and are truncated, and every record exactly once."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from feedback_kit import BY_KIND, NAME, NOW, OUTPUTS, Site, line, record, uuid7
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.example import Example, Message
from daemon import ingest
from daemon.ingest import feedback, feedback_file
from daemon.ingest.problem import Problem
from daemon.service.house import House
from daemon.service.intake import Intake
from daemon.state import audit, files, quarantine, records


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An empty site with the model `npc`."""
    made = Site(tmp_path)
    yield made
    made.database.close()


PROMPT = (Message("user", "Question 1?"),)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("boolean", [Example(shape="boolean", prompt=PROMPT, completion="Shown.", label=True)]),
        (
            "demonstration",
            [
                Example(shape="demonstration", prompt=PROMPT, completion="Better."),
                Example(shape="comparison", prompt=PROMPT, completion="Better.", rejected="Shown."),
            ],
        ),
        ("comparison", [Example(shape="comparison", prompt=PROMPT, completion="Answer b.", rejected="Answer a.")]),
        ("float", []),
        ("categorical", []),
        ("comment", []),
        ("retraction", []),
    ],
)
def test_every_kind_becomes_what_can_be_learned_from_it(site: Site, kind: str, wanted: list[Example]) -> None:
    """Kinds that are never trained on are stored all the same, for evaluations and for review."""
    outcome = site.append(record(kind=kind) if kind != "retraction" else record(2, kind))
    assert (outcome.records, outcome.new, site.codes()) == (1, len(wanted), [])
    assert site.examples() == wanted
    assert set(records.counts(site.database, "npc")) == {f"{kind}/{'journal' if wanted else 'stored'}"}


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"schema": "eternad.feedback/2"}, "unknown_schema", "this eternad reads"),
        ({"schema": None}, "unknown_schema", "this eternad reads"),
        ({"id": "7"}, "bad_record", r"\$.id"),
        ({"id": "01990000-0000-4000-8000-000000000001"}, "bad_record", r"\$.id"),
        ({"ts": "2026-11-22 20:00"}, "bad_record", r"\$.ts"),
        ({"ts": "2026-11-22T20:00:00+02:00"}, "bad_record", "must be UTC"),
        ({"kind": "applause"}, "bad_record", r"\$.kind"),
        ({"model": "director"}, "model_mismatch", "drop it where it belongs"),
        ({"model": "../etc"}, "bad_record", r"\$.model"),
        ({"subject": {"id": "ann@example.org"}}, "raw_subject", "HMAC"),
        ({"subject": {"id": "h:x y z a b c"}}, "bad_record", r"\$.subject.id"),
        ({"subject": None}, "bad_record", "subject"),
        ({"source": {"app": "a", "channel": "b", "reporter": "god"}}, "bad_record", r"\$.source.reporter"),
        ({"input": None}, "bad_record", "`input` is missing"),
        ({"output": None}, "bad_record", "`output` is missing"),
        ({"metric": None}, "bad_record", "`metric` is missing"),
        ({"value": 1}, "bad_record", "true .good. or false"),
        ({"comment": "x" * 5000}, "bad_record", r"\$.comment"),
        ({"input": {"messages": []}}, "bad_record", r"\$.input.messages"),
        ({"output": {"messages": [{"role": "user", "content": "x"}]}}, "bad_record", "the assistant's"),
        ({"consent": {"basis": "terms", "scope": ["sell"]}}, "bad_record", r"\$.consent.scope"),
    ],
)
def test_a_bad_record_is_quarantined_with_what_is_wrong(
    site: Site, changes: dict[str, Any], code: str, reason: str
) -> None:
    """Where and what, and the next record is taken in."""
    outcome = site.append(record(2), record(1, **changes), record(3))
    assert (outcome.records, outcome.bad_lines) == (2, 1)
    assert site.codes() == [(code, 2)]
    row = quarantine.rows(site.database)[0]
    assert row.byte_offset == len(line(record(2))) and row.excerpt == line(record(1, **changes)).strip()
    with pytest.raises(Problem, match=reason):
        feedback.examples_of(feedback.read(record(1, **changes), "npc"))
    assert "@" not in row.message


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("comparison", {"outputs": OUTPUTS[:1]}, r"\$.outputs"),
        ("comparison", {"outputs": None}, "`outputs` is missing"),
        ("comparison", {"value": {"chosen": "c", "rejected": "a"}}, "names the output 'c'"),
        ("comparison", {"value": "b"}, "must be .chosen"),
        ("comparison", {"outputs": [OUTPUTS[0], OUTPUTS[0]]}, "an `id` of its own"),
        ("comparison", {"value": {"chosen": "a", "rejected": "a"}}, "are the same"),
        ("demonstration", {"value": ""}, "the better answer"),
        ("demonstration", {"value": [{"role": "user", "content": "x"}]}, "the assistant's"),
        ("float", {"value": True}, "finite number"),
        ("float", {"value": "5"}, "finite number"),
        ("categorical", {"value": ""}, "name of a category"),
        ("comment", {"comment": " "}, "1 to 4096"),
        ("retraction", {"value": "everything"}, "the id of the record"),
    ],
)
def test_values_must_fit_their_kind(kind: str, changes: dict[str, Any], reason: str) -> None:
    """Each kind says what it needs."""
    with pytest.raises(Problem, match=reason):
        feedback.examples_of(feedback.read(record(1, kind, **changes), "npc"))


def test_unknown_fields_are_kept_and_mean_nothing(site: Site) -> None:
    """A producer cannot give a record weight, trust, priority or a path."""
    more = {"weight": 1000, "trust": "staff", "priority": 1, "path": "/etc/shadow", "split": "train", "x": {"y": [1]}}
    site.append(record(1), record(2, **more))
    first, second = (records.get(site.database, "npc", uuid7(number)) for number in (1, 2))
    assert first is not None and second is not None
    assert feedback.extra(msgspec.json.decode(second.body)) == more
    assert {**msgspec.to_builtins(first), **dict.fromkeys(("id", "body", "body_sha256", "example_id"))} == {
        **msgspec.to_builtins(second), **dict.fromkeys(("id", "body", "body_sha256", "example_id")),
    }  # fmt: skip


def test_the_first_body_of_an_id_wins(site: Site) -> None:
    """The same again is a no-op however it is written; another body is a conflict."""
    again = b'{"value": true, ' + line({key: value for key, value in record(1).items() if key != "value"})[1:]
    outcome = site.append(record(1), again, record(1, value=False), record(1))
    assert (outcome.records, outcome.repeated, outcome.bad_lines, len(site.examples())) == (1, 2, 1, 1)
    assert site.codes() == [("id_conflict", 3)]
    assert site.append(record(1)).repeated == 1


def test_a_subject_withdraws_its_own_records_and_no_others(site: Site) -> None:
    """Withdrawn before it came, in the same batch or later; a stranger's retraction is refused."""
    stranger = {"subject": {"id": "h:fedcba9876543210"}}
    site.append(record(9, "retraction", value=uuid7(1)), record(1), record(2), record(3, "demonstration"))
    assert [site.state_of(number) for number in (1, 2, 3)] == ["retracted", "journal", "journal"]
    outcome = site.append(
        record(10, "retraction", value=uuid7(2)), record(11, "retraction", value=uuid7(3), **stranger)
    )
    assert (outcome.retracted, site.state_of(2), site.state_of(3)) == (1, "retracted", "journal")
    assert site.codes() == [("foreign_retraction", 6)]
    assert site.append(record(12, "retraction", value=uuid7(3))).retracted == 2
    assert site.examples() == []


def test_an_example_that_two_subjects_gave_stays_when_one_withdraws(site: Site) -> None:
    """It is attributed to the other from then on."""
    other = {"subject": {"id": "h:fedcba9876543210"}}
    asked = {"input": {"messages": [{"role": "user", "content": "The same?"}]}}
    site.append(record(1, **asked), record(2, **asked, **other))
    assert site.append(record(9, "retraction", value=uuid7(1))).retracted == 0
    assert len(site.examples()) == 1
    assert site.database.execute("SELECT subject, record_id FROM example").fetchone() == (
        "h:fedcba9876543210", uuid7(2),
    )  # fmt: skip
    assert site.append(record(10, "retraction", value=uuid7(2), **other)).retracted == 1


@pytest.mark.parametrize(
    ("consent", "state"),
    [
        ({"basis": "terms", "scope": ["train"]}, "journal"),
        ({"basis": "terms", "scope": ["eval"]}, "stored"),
        ({"basis": "terms", "scope": ["train"], "expires": "2020-01-01T00:00:00Z"}, "stored"),
        ({"basis": "terms", "scope": ["train"], "expires": "2099-01-01T00:00:00Z"}, "journal"),
    ],
)
def test_nothing_is_learned_without_consent(site: Site, consent: dict[str, Any], state: str) -> None:
    """A record whose consent does not cover training, or has expired, is stored and not learned from."""
    site.append(record(1, consent=consent))
    assert site.state_of(1) == state


def test_consent_that_runs_out_withdraws_what_was_learned_from_it(site: Site) -> None:
    """Journal and review queue alike; an example that somebody else gave as well stays, as theirs."""
    until = {"basis": "terms", "scope": ["train"], "expires": "2027-01-15T08:00:10Z"}  # ten seconds after NOW
    twin = {"input": record(1)["input"], "subject": {"id": "h:fedcba9876543210"}}
    site.append(record(1, consent=until), record(2, consent=until), record(3), record(4, **twin))
    assert ingest.expire(site.database, NOW + 9) == 0
    assert ingest.expire(site.database, NOW + 11) == 2 and ingest.expire(site.database, NOW + 11) == 0
    assert [site.state_of(number) for number in (1, 2, 3, 4)] == ["retracted", "retracted", "journal", "journal"]
    assert len(site.examples()) == 2
    subjects = site.database.execute("SELECT subject FROM example WHERE state <> 'retracted' ORDER BY id").fetchall()
    assert subjects[0] == ("h:fedcba9876543210",)


def test_a_line_counts_when_its_end_is_there(site: Site) -> None:
    """A producer in the middle of a write is waited for."""
    whole = line(record(2))
    assert site.append(record(1), whole[:100]).records == 1
    assert site.append(whole[100:-1]).records == 0
    assert site.append(b"\n").records == 1
    assert site.codes() == []


def test_only_what_was_appended_is_read(site: Site) -> None:
    """A million lines are not parsed again for one more."""
    site.append(*(record(number) for number in range(50)))
    outcome = site.append(record(51))
    assert (outcome.records, outcome.repeated) == (1, 0)
    row = files.get(site.database, NAME)
    assert row is not None and (row.offset, row.lines) == (site.path.stat().st_size, 51)


def test_a_rotated_file_is_followed_under_its_new_name(site: Site) -> None:
    """logrotate: rename, go on under the old name with a new file, and write the rest to the renamed one."""
    site.append(*(record(number) for number in range(20)))
    rotated = site.path.with_name("events.jsonl.1")
    site.path.rename(rotated)
    with rotated.open("ab") as file:
        file.write(line(record(20)))
    outcome = site.append(record(21))
    assert (outcome.records, outcome.repeated) == (1, 0)
    outcome = site.take_in("feedback/npc/game/events.jsonl.1")
    assert (outcome.records, outcome.repeated) == (1, 0)


@pytest.mark.parametrize("kept", [0, 3])
def test_a_truncated_file_is_read_from_its_start(site: Site, kept: int) -> None:
    """copytruncate, with or without lines that come again: what was there counts once."""
    site.append(*(record(number) for number in range(10)))
    os.truncate(site.path, 0)
    outcome = site.append(*(record(number) for number in range(10 - kept, 30)))
    assert (outcome.records, outcome.repeated) == (20, kept)


def test_a_file_that_was_written_over_in_place_is_read_from_its_start(site: Site) -> None:
    """Same inode, larger than before, other content: the marks before the offset tell."""
    site.append(*(record(number) for number in range(10)))
    with site.path.open("r+b") as file:
        file.write(b"".join(line(record(number)) for number in range(100, 140)))
    assert site.take_in().records == 40


def test_a_long_file_is_taken_in_in_portions(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's loop turns between them, and the row grows, which brings the file again at once."""
    monkeypatch.setattr(feedback_file, "BATCH_LINES", 10)
    monkeypatch.setattr(feedback_file, "BATCHES_PER_CALL", 2)
    first = site.append(*(record(number) for number in range(45)))
    assert (first.state, first.records) == ("partial", 20)
    signatures = {files.known(site.database, NAME)}
    states = []
    while not states or states[-1] == "partial":
        states.append(site.take_in().state)
        signatures.add(files.known(site.database, NAME))
    assert states == ["partial", "read"] and len(signatures) == 3
    assert len(site.examples()) == 45


def test_a_backlog_is_taken_in_without_a_pause_between_the_turns(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's next turn follows at once while a file has more lines than one turn takes."""
    monkeypatch.setattr(feedback_file, "BATCH_LINES", 2)
    monkeypatch.setattr(feedback_file, "BATCHES_PER_CALL", 2)
    site.path.write_bytes(b"".join(line(record(number)) for number in range(10)))
    intake = Intake(cast(House, SimpleNamespace(database=site.database, config=site.config)))
    intake.watch()
    behind = []
    while not behind or behind[-1]:
        intake.take_in(NOW + len(behind))
        behind.append(intake.is_behind)
    intake.close()
    assert behind == [True, True, False] and len(site.examples()) == 10


def test_a_million_bad_lines_do_not_fill_the_database(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones are listed, the rest is counted."""
    monkeypatch.setattr(quarantine, "LINES_MAX", 30)
    site.append(*(b"bad %d\n" % number for number in range(3000)), record(1))
    assert len(site.codes()) == 31 and ("many_bad_lines", None) in site.codes()
    assert site.state_of(1) == "journal"


def test_a_bad_line_can_be_retried(site: Site, tmp_path: Path) -> None:
    """After an upgrade, say; a line that is still bad stays listed."""
    site.append(b'{"schema": "eternad.feedback/2"}\n')
    with pytest.raises(ingest.CannotRetry, match="still bad: `schema`"):
        ingest.retry(site.database, site.config, 1, NOW)
    site.database.execute("UPDATE quarantine SET excerpt = ?", (line(record(1)).strip(),))
    assert "1 new" in ingest.retry(site.database, site.config, 1, NOW)
    assert site.codes() == [] and site.state_of(1) == "journal"


def test_every_portion_is_in_the_audit_log(site: Site) -> None:
    """Who changed what a model learns, and when, can be read later."""
    site.append(record(1), b"bad\n")
    entry = audit.entries(site.database)[-1]
    assert (entry.event, entry.subject) == ("file.read", NAME)
    assert entry.detail == {"records": 1, "new": 1, "bad_lines": 1, "offset": site.path.stat().st_size}


ANY = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.lists(st.text(max_size=3), max_size=3) | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
)  # fmt: skip
TREES = st.fixed_dictionaries(
    {"kind": st.sampled_from(sorted(BY_KIND))},
    optional=dict.fromkeys(sorted(feedback.FIELDS - {"kind"}), ANY),
)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_any_record_is_read_or_refused(changes: dict[str, Any]) -> None:
    """Whatever stands in the fields, the only failure is a `Problem`."""
    try:
        feedback.examples_of(feedback.read({**record(1, changes["kind"]), **changes}, "npc"))
    except Problem as problem:
        assert problem.code in {"bad_record", "raw_subject", "unknown_schema", "model_mismatch"}


def test_the_published_schema_is_that_of_the_reader() -> None:
    """`docs/feedback.schema.json` is made of the struct: renew it from `json_schema()` when that changes."""
    published = Path(__file__).parent.parent / "docs" / "feedback.schema.json"
    assert msgspec.json.decode(published.read_bytes()) == feedback.json_schema()


def test_the_example_in_the_documentation_is_a_good_record() -> None:
    """What people copy must work."""
    whole = (Path(__file__).parent.parent / "docs" / "feedback.md").read_text("utf-8")
    example = whole[whole.index('    {"schema"') : whole.index("(on one line)")]
    assert len(feedback.examples_of(feedback.read(msgspec.json.decode(example), "npc"))) == 1


def test_a_file_that_was_cut_and_grew_again_past_where_it_was_read_is_read_from_its_start(site: Site) -> None:
    """Same beginning, same ending of every line, same size: the ids before the offset are what tells."""
    site.append(*(record(number) for number in range(100, 140)))
    lines = site.path.read_bytes().splitlines(keepends=True)
    site.path.write_bytes(b"".join([*lines[:20], *(line(record(number)) for number in range(140, 165))]))
    assert site.take_in().records == 25
