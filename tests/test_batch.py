"""Batch manifests: all of the files or none, as soon as the last is there, and never a part of them."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from daemon import ingest
from daemon.config import Config, Engine, Model, Watch
from daemon.ingest.outcome import Outcome
from daemon.state import files, quarantine
from daemon.state.database import Connection, open_database
from daemon.watch import Watcher

HOME = "content/npc/act-1"
GOOD = {"a.md": "**Q:** Who?\n**A:** Nobody.\n", "scenes/b.txt": "The heron guards the desk."}


class Site:
    """A library with a watcher, and what the daemon would do with what it finds."""

    def __init__(self, directory: Path) -> None:
        self.library = directory / "library"
        self.config = Config(
            library_directory=self.library, state_directory=directory / "state",
            models={"npc": Model(base_path=directory, engine="e")}, engines={"e": Engine()},
            watch=Watch(stability_seconds=1000, scan_seconds=0.001, never_stable_seconds=3000),
        )  # fmt: skip
        self.database: Connection = open_database(directory / "state" / "eternad.db")
        self.watcher = Watcher(self.library, self.config.watch)
        self.watcher.start()
        self.now = time.time()

    def write(self, name: str, text: str) -> None:
        """Write a file below the batch's directory, in place."""
        path = self.library / HOME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def manifest(self, listed: dict[str, str], **changes: Any) -> None:
        """Write a manifest of these files."""
        rows = [
            {"path": name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "size": len(text.encode()), **changes}
            for name, text in listed.items()
        ]
        self.write("one.batch.json", json.dumps({"files": rows}))

    def turn(self, after: float = 10.0) -> list[Outcome]:
        """What the daemon does some seconds later."""
        self.now += after
        known = partial(files.known, self.database)
        outcomes = []
        for finished in self.watcher.finished(self.now, known):
            outcomes.append(ingest.ingest_file(self.database, self.config, finished, self.now))
            self.watcher.expect(outcomes[-1].awaited)
        return outcomes

    @property
    def stored(self) -> int:
        """How many examples there are."""
        return int(self.database.execute("SELECT count(*) FROM example").fetchone()[0])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An empty site; a file on its own would wait for 1,000 seconds."""
    site = Site(tmp_path)
    yield site
    site.watcher.stop()
    site.database.close()


def test_a_complete_batch_is_taken_in_at_once_and_together(site: Site) -> None:
    """No file of it waits to settle: its hash says that it is complete."""
    for name, text in GOOD.items():
        site.write(name, text)
    site.manifest(GOOD)
    assert [(each.state, each.new) for each in site.turn()] == [("read", 2)]
    assert site.stored == 2 and site.turn(2000) == []
    site.write("a.md", "**Q:** Who?\n**A:** Somebody.\n")
    assert [each.path for each in site.turn() + site.turn(2000)] == [f"{HOME}/a.md"], "on its own again"


def test_nothing_of_a_batch_counts_before_its_last_file(site: Site) -> None:
    """Not even after the time in which any other file would be read; when the last comes, all are."""
    site.manifest(GOOD)
    site.write("a.md", GOOD["a.md"])
    assert {each.state for each in site.turn()} == {"waiting"} and {each.state for each in site.turn(2000)} == {
        "waiting"
    }
    site.write("scenes/b.txt", GOOD["scenes/b.txt"][:7])
    assert site.turn() and site.stored == 0
    site.write("scenes/b.txt", GOOD["scenes/b.txt"])
    site.turn(0.1)
    assert site.stored == 2


def test_one_bad_file_refuses_the_whole_batch(site: Site) -> None:
    """The reason names it; the good ones are not taken in on their own either, until a better manifest comes."""
    bad = GOOD | {"c.json": '{"neither": "nor"}'}
    site.manifest(bad)
    for name, text in bad.items():
        site.write(name, text)
    site.turn()
    for _ in range(3):
        site.turn(2000)
    (row,) = quarantine.rows(site.database)
    assert row.code == "batch_refused" and "c.json: bad_row" in row.message and site.stored == 0
    assert (site.library / HOME / "a.md").exists()
    site.manifest(GOOD)
    site.turn()
    assert site.stored == 2


def test_a_batch_that_stays_incomplete_is_told_of(site: Site) -> None:
    """After `never_stable_seconds`."""
    site.manifest(GOOD)
    site.write("a.md", GOOD["a.md"])
    for _ in range(4):
        site.turn(1500)
    assert [(row.code, row.retryable) for row in quarantine.rows(site.database)] == [("batch_incomplete", True)]
    assert "b.txt is not there" in quarantine.rows(site.database)[0].message and site.stored == 0


def test_files_of_a_manifest_that_was_taken_away_are_files_like_any_others(site: Site) -> None:
    """Whoever removes it gives up on all or nothing."""
    site.manifest(GOOD)
    site.write("a.md", GOOD["a.md"])
    site.turn()
    (site.library / HOME / "one.batch.json").unlink()
    site.turn(2000)
    assert site.stored == 1


@pytest.mark.parametrize(
    ("listed", "changes"),
    [
        ({"../../other/a.md": ""}, {}), ({"/etc/passwd": ""}, {}), ({"a//b.md": ""}, {}), ({".git/x.md": ""}, {}),
        ({}, {}), ({"a.md": ""}, {"sha256": "x"}), ({"a.md": ""}, {"size": -1}), ({"x.batch.json": ""}, {}),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_refused(site: Site, listed: dict[str, str], changes: dict[str, Any]) -> None:
    """Paths never lead out of its directory."""
    site.manifest(listed, **changes)
    assert [each.state for each in site.turn()] == ["quarantined"]
    assert quarantine.rows(site.database)[0].code == "bad_manifest"


def test_a_torn_manifest_waits_for_its_end(site: Site) -> None:
    """It may still be written; after a minute it is refused."""
    site.write("one.batch.json", '{"files": [{"pa')
    path = site.library / HOME / "one.batch.json"
    os.utime(path, (site.now, site.now))
    assert [each.state for each in site.turn()] == ["waiting"]
    assert [each.state for each in site.turn(100)] == ["quarantined"]


def test_a_kill_between_the_files_leaves_nothing_of_the_batch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is one transaction."""
    for name, text in GOOD.items():
        site.write(name, text)
    site.manifest(GOOD)
    first = ingest.batch._one  # type: ignore[attr-defined]

    def dies_at_the_second(*arguments: Any) -> Outcome:
        if arguments[2].endswith("b.txt"):
            raise KeyboardInterrupt
        return first(*arguments)

    monkeypatch.setattr(ingest.batch, "_one", dies_at_the_second)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        site.turn()
    assert site.stored == 0 and files.known(site.database, f"{HOME}/a.md") is None
    monkeypatch.undo()
    site.turn(2000)
    assert site.stored == 2
