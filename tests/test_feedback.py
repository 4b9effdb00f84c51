"""Feedback: strict records, files that grow, rotate and are truncated, and every record exactly once."""

import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.example import Example, Message, parse
from daemon import ingest
from daemon.config import Config, Engine, Model, Source, Trust
from daemon.ingest import feedback, feedback_file
from daemon.ingest.outcome import Outcome
from daemon.ingest.problem import Problem
from daemon.state import audit, files, quarantine, records
from daemon.state.database import Connection, open_database
from daemon.state.files import Finished, Signature

NOW = 1_800_000_000.0
NAME = "feedback/npc/game/events.jsonl"


def uuid7(number: int) -> str:
    """A UUIDv7 that tells its number."""
    return f"01990000-{number >> 16 & 0xFFFF:04x}-7{number & 0xFFF:03x}-8000-{number:012x}"


def record(number: int = 1, kind: str = "boolean", **changes: Any) -> dict[str, Any]:
    """A good record of a kind; a change to None takes a field away."""
    whole: dict[str, Any] = {
        "schema": "eternad.feedback/1", "id": uuid7(number), "ts": "2026-11-22T20:00:00Z", "kind": kind, "model": "npc",
        "inference": {"id": f"inf-{number}", "adapter": "npc-0007"},
        "input": {"messages": [{"role": "user", "content": f"Question {number}?"}]},
        "output": {"messages": [{"role": "assistant", "content": "Shown."}]}, "metric": "thumb", "value": True,
        "subject": {"id": "h:0123456789abcdef"}, "source": {"app": "game", "channel": "hall", "reporter": "player"},
    } | BY_KIND.get(kind, {}) | changes  # fmt: skip
    return {key: value for key, value in whole.items() if value is not None}


OUTPUTS = [{"id": name, "messages": [{"role": "assistant", "content": f"Answer {name}."}]} for name in "ab"]
BY_KIND: dict[str, dict[str, Any]] = {
    "boolean": {},
    "demonstration": {"value": "Better.", "metric": None},
    "comparison": {"outputs": OUTPUTS, "output": None, "metric": None, "value": {"chosen": "b", "rejected": "a"}},
    "float": {"metric": "stars", "value": 3.5},
    "categorical": {"metric": "reason", "value": "too-long"},
    "comment": {"value": None, "comment": "He was rude."},
    "retraction": {"value": uuid7(1), "input": None, "output": None, "metric": None},
}


def line(whole: Any) -> bytes:
    """One line of a feedback file."""
    return bytes(msgspec.json.encode(whole)) + b"\n"


class Site:
    """A library with one feedback file, and a database."""

    def __init__(self, directory: Path) -> None:
        self.library, self.directory = directory / "library", directory
        self.config = Config(
            library_directory=self.library, state_directory=directory / "state",
            models={"npc": Model(base_path=directory, engine="embedded")}, engines={"embedded": Engine()},
            trust=Trust(sources={"game": Source(trusted=True)}),
        )  # fmt: skip
        self.database: Connection = open_database(directory / "state" / "eternad.db")
        self.path = self.library / NAME
        self.path.parent.mkdir(parents=True)

    def append(self, *rows: Any) -> Outcome:
        """Append records (or raw bytes) and take them in."""
        with self.path.open("ab") as file:
            for row in rows:
                file.write(row if isinstance(row, bytes) else line(row))
        return self.take_in()

    def take_in(self, name: str = NAME) -> Outcome:
        """Take in a file as it is now."""
        seen = os.lstat(self.library / name)
        signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        finished = Finished(path=name, relative=name, signature=signature)
        return ingest.ingest_file(self.database, self.config, finished, NOW)

    def examples(self) -> list[Example]:
        """Everything in the journal that was not withdrawn, in order."""
        found = self.database.execute("SELECT body FROM example WHERE state <> 'retracted' ORDER BY id")
        return [parse(body) for (body,) in found]

    def codes(self) -> list[tuple[str, int | None]]:
        """(code, line) of the quarantine, oldest first."""
        return [(row.code, row.line) for row in reversed(quarantine.rows(self.database))]

    def state_of(self, number: int) -> str:
        """What became of a record."""
        row = records.get(self.database, "npc", uuid7(number))
        return "unknown" if row is None else row.state


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


INGEST_CHILD = """
    import os, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from daemon import ingest
    from daemon.config import Config, Engine, Model, Source, Trust
    from daemon.ingest import feedback_file
    from daemon.state import files
    from daemon.state.database import open_database
    from daemon.state.files import Finished, Signature
    feedback_file.BATCH_LINES = int(sys.argv[2])
    directory = Path(sys.argv[1])
    library = directory / "library"
    config = Config(library_directory=library, state_directory=directory / "state",
                    models={{"npc": Model(base_path=directory, engine="e")}}, engines={{"e": Engine()}},
                    trust=Trust(sources={{"game": Source(trusted=True)}}))
    database = open_database(directory / "state" / "eternad.db")
    print("ready", flush=True)
    while True:
        is_last, waiting = (directory / "stop").exists(), 0
        for path in sorted((library / "feedback/npc/game").iterdir()):
            name = str(path.relative_to(library))
            try:
                seen = os.lstat(path)
            except FileNotFoundError:
                continue
            signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
            if files.known(database, name) != signature:
                finished = Finished(path=name, relative=name, signature=signature)
                waiting += ingest.ingest_file(database, config, finished, 1.0).state == "partial"
        if is_last and not waiting:
            break
"""


class Producer:
    """Appends to one file, rotates it, truncates it once it is read, replaces it; knows what it wrote, in order."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.next = path, first
        self.written: list[list[int]] = [[]]

    def append(self, count: int) -> None:
        """Write so many more records, the last of them in two pieces."""
        numbers = list(range(self.next, self.next + count))
        whole = b"".join(line(record(number, subject={"id": f"h:{number % 50:016x}"})) for number in numbers)
        with self.path.open("ab") as file:
            file.write(whole[:-40])
            file.flush()
            file.write(whole[-40:])
        self.next += count
        self.written[-1] += numbers

    def rotate(self) -> None:
        """Rename the file away and go on with a new one."""
        if self.path.exists():
            self.path.rename(self.path.with_name(f"{self.path.name}.{self.next}"))
            self.written.append([])

    def replace(self) -> None:
        """Write a copy that holds everything so far, and put it in the place of the file."""
        copy = self.path.with_name(f".{self.path.name}")
        copy.write_bytes(self.path.read_bytes() if self.path.exists() else b"")
        copy.rename(self.path)


def kill_while_ingesting(directory: Path, kills: int, seed: int) -> None:
    """SIGKILL the ingesting child at random moments while files grow, rotate and are replaced; then ask the oracle."""
    draw, site = random.Random(seed), Site(directory)
    site.database.close()
    producers = [
        Producer(site.path.with_name(f"{name}.jsonl"), 100_000 * (index + 1)) for index, name in enumerate("abc")
    ]
    script = textwrap.dedent(INGEST_CHILD).format(root=str(Path(__file__).parent.parent))
    command = [sys.executable, "-c", script, str(directory), "7"]
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            for _ in range(draw.randrange(1, 6)):
                producer = draw.choice(producers)
                producer.append(draw.randrange(1, 60))
                if draw.random() < 0.3:
                    draw.choice([producer.rotate, producer.replace])()
                time.sleep(draw.random() * 0.02)
            child.kill()
    (directory / "stop").touch()
    command[-1] = "1000"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    check_once_and_in_order(directory, [each for producer in producers for each in producer.written])


def check_once_and_in_order(directory: Path, written: list[list[int]]) -> None:
    """Every record that was written is there once, per file in the order of writing, and nothing else is."""
    database = open_database(directory / "state" / "eternad.db")
    stored = [identity for (identity,) in database.execute("SELECT id FROM record ORDER BY rowid")]
    numbers = [int(identity.rpartition("-")[2], 16) for identity in stored]
    assert len(numbers) == len(set(numbers))
    file_of = {number: index for index, each in enumerate(written) for number in each}
    found: list[list[int]] = [[] for _ in written]
    for number in numbers:
        found[file_of[number]].append(number)
    assert found == written
    assert database.execute("SELECT count(*), sum(copies) FROM example").fetchone() == (len(numbers), len(numbers))
    assert quarantine.rows(database) == []
    assert audit.broken_at(database) is None
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def test_every_record_counts_once_whatever_is_killed_when(tmp_path: Path) -> None:
    """24 SIGKILLs while two files grow, rotate and are replaced."""
    kill_while_ingesting(tmp_path, 24, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_record_counts_once_after_500_kills(tmp_path: Path) -> None:
    """The same for longer."""
    kill_while_ingesting(tmp_path, 500, 2)


def test_the_published_schema_is_that_of_the_reader() -> None:
    """`docs/feedback.schema.json` is made of the struct: renew it from `json_schema()` when that changes."""
    published = Path(__file__).parent.parent / "docs" / "feedback.schema.json"
    assert msgspec.json.decode(published.read_bytes()) == feedback.json_schema()


def test_the_example_in_the_documentation_is_a_good_record() -> None:
    """What people copy must work."""
    whole = (Path(__file__).parent.parent / "docs" / "feedback.md").read_text("utf-8")
    example = whole[whole.index('    {"schema"') : whole.index("(on one line)")]
    assert len(feedback.examples_of(feedback.read(msgspec.json.decode(example), "npc"))) == 1
