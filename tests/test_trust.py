"""Trust: what waits for review, what a flood of one subject comes to, and how a review ends."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daemon import ingest, review
from daemon.config import Config, Engine, Model
from daemon.ingest.outcome import Outcome
from daemon.state import audit, quarantine, records
from daemon.state.database import open_database
from daemon.state.files import Finished, Signature
from daemon.trust.policy import Trust

DAY = 86400.0


def record(number: int, subject: int = 1, **changes: Any) -> dict[str, Any]:
    """A good boolean record."""
    return {
        "schema": "eternad.feedback/1", "id": identity(number), "ts": "2026-11-22T20:00:00Z", "kind": "boolean",
        "model": "npc", "input": {"messages": [{"role": "user", "content": f"Question {number}?"}]},
        "output": {"messages": [{"role": "assistant", "content": "Shown."}]}, "metric": "thumb", "value": True,
        "subject": {"id": f"h:{subject:016x}"}, "source": {"app": "game", "channel": "hall", "reporter": "staff"},
    } | changes  # fmt: skip


def identity(number: int) -> str:
    """The UUIDv7 of a number."""
    return f"01990000-0000-7000-8000-{number:012x}"


class Site:
    """A library and a database with the model `npc`."""

    def __init__(self, directory: Path) -> None:
        self.library = directory / "library"
        self.config = Config(
            library_directory=self.library, state_directory=directory / "state",
            models={"npc": Model(base_path=directory, engine="embedded")}, engines={"embedded": Engine()},
            trust=Trust(probation_seconds=0),
        )  # fmt: skip
        self.database = open_database(directory / "state" / "eternad.db")

    def trust(self, **changes: Any) -> None:
        """Configure."""
        self.config = msgspec.structs.replace(self.config, trust=Trust(**{"probation_seconds": 0.0} | changes))

    def append(self, *rows: dict[str, Any], at: float = 10 * DAY, source: str = "game") -> Outcome:
        """Append records to a source's file and take them in."""
        name = f"feedback/npc/{source}/events.jsonl"
        (self.library / name).parent.mkdir(parents=True, exist_ok=True)
        with (self.library / name).open("ab") as file:
            file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        seen = os.lstat(self.library / name)
        signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        finished = Finished(path=name, relative=name, signature=signature)
        outcome = ingest.ingest_file(self.database, self.config, finished, at)
        while outcome.state == "partial":  # a call takes about a second's work
            outcome.count(more := ingest.ingest_file(self.database, self.config, finished, at))
            outcome.state = more.state
        return outcome

    def states(self) -> list[str]:
        """What became of each record, in order."""
        return [row[0] for row in self.database.execute("SELECT state FROM record ORDER BY rowid")]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An empty site."""
    made = Site(tmp_path)
    yield made
    made.database.close()


def test_one_subject_cannot_flood(site: Site) -> None:
    """10,000 records of one subject come to 20 examples a day; the others wait, and nobody else is held up."""
    outcome = site.append(*(record(number) for number in range(10_000)), record(20_000, subject=2))
    assert (outcome.records, outcome.new, outcome.held) == (10_001, 21, 9_980)
    assert site.append(record(30_000)).held == 1
    assert site.append(record(30_001), at=11.5 * DAY).held == 0
    assert "more than 20 records" in records.held(site.database, "npc", 1)[0].reason


def test_the_cap_counts_across_files_and_sources(site: Site) -> None:
    """Dropping the same subject's records in many files does not help."""
    site.trust(examples_per_subject_day=2)
    site.append(record(1))
    site.append(record(2), source="hall")
    assert site.append(record(3), source="cellar").held == 1


def test_free_text_of_players_is_reviewed(site: Site) -> None:
    """What counts is the directory: a record that claims to be from staff is not believed."""
    site.trust(free_text_from=["staff"])
    better = {"kind": "demonstration", "value": "Better."}
    assert site.append(record(1, **better), record(2)).held == 1
    assert site.append(record(3, **better), source="staff").held == 0
    assert site.states() == ["held", "journal", "journal"]


def test_consent_can_be_required(site: Site) -> None:
    """Without it a record waits; with it, it is learned from."""
    site.trust(require_consent=True)
    site.append(record(1), record(2, consent={"basis": "terms", "scope": ["train"]}))
    assert site.states() == ["held", "journal"]


def test_a_reviewed_record_is_learned_from_or_never(site: Site) -> None:
    """Either way it leaves the queue, and the audit log says who decided."""
    site.trust(examples_per_subject_day=1)
    site.append(record(1), record(2), record(3))
    assert [row.id for row in records.held(site.database)] == [identity(2), identity(3)]
    assert review.accept(site.database, site.config, "npc", identity(2), "ann", 10 * DAY) == 1
    review.reject(site.database, "npc", identity(3), "ann")
    assert site.states() == ["journal", "journal", "rejected"]
    assert [(entry.event, entry.actor) for entry in audit.entries(site.database)][-2:] == [
        ("record.accepted", "ann"), ("record.rejected", "ann"),
    ]  # fmt: skip
    with pytest.raises(review.NotHeld, match="it is rejected"):
        review.accept(site.database, site.config, "npc", identity(3), "ann", 10 * DAY)


def test_a_held_record_can_be_withdrawn(site: Site) -> None:
    """Before anybody has looked at it."""
    site.trust(examples_per_subject_day=1)
    site.append(record(1), record(2), record(9, kind="retraction", value=identity(2)))
    assert site.states() == ["journal", "retracted", "stored"]


LONG = "the library has no end and whoever walks far enough comes back to where he began to walk"


def drop(site: Site, name: str, data: str) -> Outcome:
    """Write a content or evaluation file and take it in."""
    (site.library / name).parent.mkdir(parents=True, exist_ok=True)
    (site.library / name).write_text(data, "utf-8")
    seen = os.lstat(site.library / name)
    signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
    finished = Finished(path=name, relative=name, signature=signature)
    return ingest.ingest_file(site.database, site.config, finished, 10 * DAY)


def test_what_stands_in_the_evaluation_is_not_trained_on(site: Site) -> None:
    """Thirteen words in a row, whatever stands around them, or a short question with its answer."""
    drop(site, "eval/npc/a.md", f"It is said: {LONG}.\n\n# Q\n\nQ: Who keeps it?\nA: Nobody.\n")
    outcome = drop(
        site, "content/npc/a.md",
        f"He whispered, {LONG.upper()}!\n\n# Q\n\nQ: Who keeps it?\nA: Nobody!\n\nQ: Who keeps it?\nA: The porter.\n",
    )  # fmt: skip
    assert outcome.new == 1
    assert site.database.execute("SELECT split, count(*) FROM example GROUP BY 1 ORDER BY 1").fetchall() == [
        ("eval", 2), ("train", 1),
    ]  # fmt: skip
    assert quarantine.rows(site.database)[0].code == "contaminated"
    answer = {"output": {"messages": [{"role": "assistant", "content": f"Well, {LONG}."}]}}
    site.append(record(1, **answer), record(2))
    assert site.states() == ["stored", "journal"]


def test_a_shared_question_is_no_contamination(site: Site) -> None:
    """System prompts and canned questions stand in everything; what counts is what the model says."""
    row = {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": f"Is it true that {LONG}?"}]}
    for name, answer in (("eval/npc/a.jsonl", "Yes."), ("content/npc/a.jsonl", "No.")):
        told = {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}
        assert drop(site, name, msgspec.json.encode(told).decode() + "\n").new == 1
