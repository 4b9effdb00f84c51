"""Erasure: a subject's data is nowhere in what the daemon keeps, the versions that learned it are named."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buffers import claims, experience
from daemon import ingest
from daemon.config import Config, Engine, Model
from daemon.erasure import CannotErase, Receipt, erase
from daemon.ingest.outcome import Outcome
from daemon.state import audit, quarantine, records, runs
from daemon.state.database import open_database, transaction
from daemon.state.files import Finished, Signature
from daemon.trust.policy import Source, Trust

NOW = 1_800_000_000.0
ALICE, BOB = "h:aaaaaaaaaaaaaaaa", "h:bbbbbbbbbbbbbbbb"
SECRET = "Unmistakable-Marmalade"
NAME = "feedback/npc/game/events.jsonl"


def record(number: int, subject: str, said: str) -> dict[str, Any]:
    """A good boolean record."""
    return {
        "schema": "eternad.feedback/1", "id": f"01990000-0000-7000-8000-{number:012x}", "ts": "2026-11-22T20:00:00Z",
        "kind": "boolean", "model": "npc", "input": {"messages": [{"role": "user", "content": said}]},
        "output": {"messages": [{"role": "assistant", "content": "Shown."}]}, "metric": "thumb", "value": True,
        "subject": {"id": subject}, "source": {"app": "game", "channel": "hall", "reporter": "player"},
    }  # fmt: skip


class Site:
    """A library with one feedback file, a state directory and its database."""

    def __init__(self, directory: Path) -> None:
        self.library, self.state = directory / "library", directory / "state"
        self.config = Config(
            library_directory=self.library, state_directory=self.state,
            models={"npc": Model(base_path=directory, engine="embedded")}, engines={"embedded": Engine()},
            trust=Trust(sources={"game": Source(trusted=True)}),
        )  # fmt: skip
        self.database = open_database(self.state / "eternad.db")
        (self.library / NAME).parent.mkdir(parents=True)

    def append(self, *rows: Any) -> Outcome:
        """Append records (or raw bytes) and take them in."""
        with (self.library / NAME).open("ab") as file:
            for row in rows:
                file.write(row if isinstance(row, bytes) else msgspec.json.encode(row) + b"\n")
        seen = os.lstat(self.library / NAME)
        signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        return ingest.ingest_file(
            self.database, self.config, Finished(path=NAME, relative=NAME, signature=signature), NOW
        )

    def learn(self, recipe: experience.Recipe = experience.Recipe()) -> runs.Run:  # noqa: B008 - frozen
        """A run that claims everything that waits and has its experience on disk."""
        with transaction(self.database):
            run = runs.create(self.database, "npc", "manual", None, 1000)
        assert run is not None
        (self.state / "runs" / run.id).mkdir(parents=True)
        path = self.state / "runs" / run.id / "experience.jsonl"
        experience.cut(self.database, "npc", run.id, run.update_number, recipe, path)
        return run

    def holds(self, text: str) -> list[str]:
        """Files below the state directory in whose bytes a text stands."""
        return [path.name for path in self.state.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An empty site."""
    made = Site(tmp_path)
    yield made
    made.database.close()


def publish(site: Site, run: runs.Run) -> None:
    """The run ends as version 1."""
    with transaction(site.database):
        for state in ("TRAINING", "TRAINED", "EVALUATING", "ACCEPTED"):
            run = runs.move(site.database, run, state)
        run = runs.move(site.database, run, "PUBLISHED", version=1)
        runs.publish(site.database, run, 1, "0" * 64)
        claims.consume(site.database, run.id, run.update_number)
        runs.move(site.database, run, "LIVE")


def test_nothing_of_an_erased_subject_is_left_on_disk(site: Site) -> None:
    """Database, WAL, run directories, quarantine: the bytes are gone, and the receipt says what else there is."""
    bad = msgspec.json.encode({**record(8, ALICE, SECRET), "value": "maybe"}) + b"\n"
    site.append(*(record(number, ALICE, f"{SECRET} {number}") for number in range(5)), bad, record(9, BOB, "Else."))
    publish(site, site.learn())
    said = site.state / "cache" / "standing" / "weights.safetensors"  # what a model has said of hold-outs
    said.parent.mkdir(parents=True)
    said.write_bytes(SECRET.encode())
    (digest,) = site.database.execute("SELECT hash FROM example WHERE subject = ? LIMIT 1", (ALICE,)).fetchone()
    reworded = site.state / "cache" / "derived" / f"{digest}.2.txt"  # what a teacher has made of an example
    reworded.parent.mkdir(parents=True)
    reworded.write_bytes(SECRET.encode())
    assert site.holds(SECRET) and site.holds(ALICE)
    receipt = erase(site.database, site.config, ALICE, NOW)
    assert site.holds(SECRET) == [] and site.holds(ALICE) == [] and not said.exists() and not reworded.exists()
    assert (receipt.records, receipt.examples, receipt.versions, receipt.files) == (6, 5, {"npc": [1]}, [NAME])
    assert len(receipt.runs_scrubbed) == 1
    kept = msgspec.json.decode(next((site.state / "receipts").iterdir()).read_bytes(), type=Receipt)
    assert kept == receipt
    assert records.counts(site.database, "npc") == {"boolean/journal": 1}
    assert site.database.execute("SELECT distinct_examples FROM intake").fetchone() == (1,)
    assert site.database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert audit.broken_at(site.database) is None


def test_a_re_drop_is_refused_and_nothing_of_it_is_kept(site: Site) -> None:
    """The tombstone is a hash; the file it comes in is read on."""
    site.append(record(1, ALICE, SECRET))
    erase(site.database, site.config, ALICE, NOW)
    outcome = site.append(record(2, ALICE, SECRET), record(3, BOB, "Else."))
    assert (outcome.records, outcome.bad_lines) == (1, 1)
    assert [(row.code, row.excerpt) for row in quarantine.rows(site.database)] == [("erased_subject", None)]
    site.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert site.holds(SECRET) == []


def test_the_index_of_likeness_forgets_as_well(site: Site) -> None:
    """No band leads to an example that is gone; those of others stay."""
    site.append(record(1, ALICE, "Who keeps the desk?"), record(2, BOB, "Where is the heron?"))
    erase(site.database, site.config, ALICE, NOW)
    left = site.database.execute("SELECT count(*), count(DISTINCT example_id) FROM example_band").fetchone()
    assert left == (5, 1)


def test_what_another_subject_gave_as_well_stays(site: Site) -> None:
    """It is that one's from then on."""
    site.append(record(1, ALICE, "The same."), record(2, BOB, "The same."))
    receipt = erase(site.database, site.config, ALICE, NOW)
    assert (receipt.examples, receipt.handed_over) == (0, 1)
    assert site.database.execute("SELECT subject FROM example").fetchall() == [(BOB,)]


def test_a_run_that_is_learning_from_it_stands_in_the_way(site: Site) -> None:
    """It must be cancelled first; until then nothing is half erased."""
    site.append(record(1, ALICE, SECRET))
    run = site.learn()
    with pytest.raises(CannotErase, match=run.id):
        erase(site.database, site.config, ALICE, NOW)
    assert records.counts(site.database, "npc") == {"boolean/journal": 1}
    with transaction(site.database):
        runs.move(site.database, run, "CANCELLED")
        claims.release(site.database, run.id, attempts_max=3, failed=False)
    assert erase(site.database, site.config, ALICE, NOW).examples == 1
    assert site.holds(SECRET) == []


def test_a_run_that_rehearses_it_stands_in_the_way(site: Site) -> None:
    """Replayed examples are the subject's data as well."""
    site.append(record(1, ALICE, SECRET), record(2, ALICE, SECRET + "!"), record(3, ALICE, SECRET + "?"))
    publish(site, site.learn())
    site.append(*(record(number, BOB, f"Else {number}.") for number in range(10, 30)))
    run = site.learn(experience.Recipe(replay_ratio=0.2))
    with pytest.raises(CannotErase, match=run.id):
        erase(site.database, site.config, ALICE, NOW)


def test_a_subject_that_is_none_is_refused(site: Site) -> None:
    """And one that is unknown is buried all the same: its data may still be on its way."""
    with pytest.raises(CannotErase, match="a subject is"):
        erase(site.database, site.config, "alice@example.org", NOW)
    assert erase(site.database, site.config, ALICE, NOW).examples == 0
    assert site.append(record(1, ALICE, SECRET)).bad_lines == 1
