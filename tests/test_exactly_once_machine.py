"""The same promise as a state machine: hypothesis looks for the order of events that loses or doubles a record.

A crash is an interrupted statement somewhere in a batch, after which the database is opened anew: what SQLite itself
does after a SIGKILL is tested with real ones (`test_exactly_once.py`).
"""

import contextlib
import os
import shutil
import sqlite3
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from exactly_once_kit import RATED_EVERY, Producer, config_of, is_subsequence, line, stored_numbers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from daemon import ingest, intake
from daemon.ingest import feedback_file
from daemon.ingest.opened import signature_of
from daemon.state import quarantine
from daemon.state.database import open_database
from daemon.state.files import Finished

NOW = 1_800_000_000.0
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@cache
def template() -> bytes:
    """A migrated database: making one takes longer than a whole sequence."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "eternad.db"
        open_database(path).close()
        return path.read_bytes()


class Intake(RuleBasedStateMachine):
    """Two files, the endpoint's file, and a daemon that may die at any statement."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(dir=IN_MEMORY))
        (self.directory / "state").mkdir()
        (self.directory / "state" / "eternad.db").write_bytes(template())
        self.producers = [Producer(self.directory, name, 1000 * (place + 1)) for place, name in enumerate("ab")]
        self.config = config_of(self.directory)
        self.posts = intake.Journal(self.config.library_directory, lambda: NOW)
        self.next_post, self.acknowledged, self.unanswered = 100_000, list[int](), list[int]()
        self.open()

    def open(self) -> None:
        """The daemon starts."""
        self.database = open_database(self.directory / "state" / "eternad.db")
        self.database.execute("PRAGMA synchronous=OFF")  # only processes die here, not the machine

    @initialize(lines=st.sampled_from([1, 2, 3, 7]))
    def batches(self, lines: int) -> None:
        """How much goes into one transaction."""
        feedback_file.BATCH_LINES = lines

    @rule(which=st.integers(0, 1), count=st.integers(1, 9))
    def append(self, which: int, count: int) -> None:
        """A server writes some records."""
        self.producers[which].append(count)

    @rule(which=st.integers(0, 1), what=st.sampled_from(["rotate", "rename", "replace"]))
    def move(self, which: int, what: str) -> None:
        """Something happens to its file."""
        getattr(self.producers[which], what)()

    @rule(which=st.integers(0, 1), keep=st.sampled_from([0.0, 0.5, 1.0]), count=st.integers(1, 3))
    def truncate(self, which: int, keep: float, count: int) -> None:
        """The file is cut in place, once it has been read, and written to again."""
        if self.producers[which].truncate(keep):
            self.producers[which].append(count)

    @rule(count=st.integers(1, 5), again=st.booleans())
    def post(self, count: int, again: bool) -> None:
        """A request is acknowledged; with `again` it is one that got no answer before."""
        numbers = self.unanswered if again and self.unanswered else self.new_posts(count)
        _, data = intake.check(b"".join(map(line, numbers)), "npc", 1 << 20, {})
        self.posts._write_durably("npc/live", data)
        self.acknowledged += numbers
        self.unanswered = []

    @rule(count=st.integers(1, 5), written=st.floats(0, 1))
    def post_unanswered(self, count: int, written: float) -> None:
        """The endpoint dies while it writes."""
        numbers = self.new_posts(count)
        data = b"".join(map(line, numbers))
        place = self.config.library_directory / "feedback/npc/live"
        place.mkdir(parents=True, exist_ok=True)
        with (place / "intake-2027-01-15.jsonl").open("ab") as file:
            file.write(data[: int(len(data) * written)])
        self.unanswered = numbers

    def new_posts(self, count: int) -> list[int]:
        """Numbers that were not used yet."""
        self.next_post += count
        return list(range(self.next_post - count, self.next_post))

    @rule(files=st.integers(1, 3))
    def take_in(self, files: int) -> None:
        """The daemon reads what it finds."""
        for path in self.found()[:files]:
            self.read(path)

    @rule(place=st.integers(0, 9), steps=st.integers(1, 400))
    def crash(self, place: int, steps: int) -> None:
        """The daemon dies within some statement of reading a file, and starts again."""
        found = self.found()
        left = [steps]

        def tick() -> int:
            left[0] -= 1
            return int(left[0] <= 0)

        if found:
            self.database.set_progress_handler(tick, 20)
            with contextlib.suppress(sqlite3.OperationalError):
                self.read(found[place % len(found)])
        self.database.close()
        self.open()

    def found(self) -> list[Path]:
        """The feedback files."""
        return sorted(path for path in (self.config.library_directory / "feedback/npc").rglob("*") if is_read(path))

    def read(self, path: Path) -> str:
        """One call of the daemon's step."""
        name = str(path.relative_to(self.config.library_directory))
        finished = Finished(path=name, relative=name, signature=signature_of(path.lstat()))
        return ingest.ingest_file(self.database, self.config, finished, NOW).state

    @invariant()
    def nothing_is_doubled(self) -> None:
        """At every moment."""
        numbers = [identity for (identity,) in self.database.execute("SELECT id FROM record")]
        assert len(numbers) == len(set(numbers))
        rated = sum(int(number.rpartition("-")[2], 16) % RATED_EVERY == 0 for number in numbers)
        assert self.database.execute("SELECT count(*), coalesce(sum(copies), 0) FROM example").fetchone() == (
            rated,
            rated,
        )

    def teardown(self) -> None:
        """After the last event everything is read, and is there once and in its order."""
        try:
            for path in self.found():
                while self.read(path) == "partial":
                    pass
            self.check()
        finally:
            self.database.close()
            shutil.rmtree(self.directory)

    def check(self) -> None:
        """The oracle."""
        self.nothing_is_doubled()
        numbers = stored_numbers(self.directory)
        written = [each for producer in self.producers for each in producer.written]
        assert all(is_subsequence(each, [number for number in numbers if number in each]) for each in written)
        assert is_subsequence(sorted(set(self.acknowledged)), sorted(numbers))
        assert set(numbers) <= {*(number for each in written for number in each), *range(100_000, self.next_post)}
        assert {row.code for row in quarantine.rows(self.database)} <= {"invalid_json"}  # what a request tore


def is_read(path: Path) -> bool:
    """Not a name that is there for a moment."""
    return path.is_file() and not path.name.startswith(".")


def run(sequences: int, **more: Any) -> None:
    """Run so many sequences."""
    before = feedback_file.BATCH_LINES
    try:
        run_state_machine_as_test(
            Intake,
            settings=settings(
                max_examples=sequences, stateful_step_count=25, deadline=None,
                suppress_health_check=list(HealthCheck), **more,
            ),
        )  # fmt: skip
    finally:
        feedback_file.BATCH_LINES = before


def test_no_order_of_events_loses_or_doubles_a_record() -> None:
    """50 sequences."""
    run(50)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(20))
def test_no_order_of_events_loses_or_doubles_a_record_in_two_thousand(part: int) -> None:
    """2,000 sequences, in twenty parts."""
    run(100)
