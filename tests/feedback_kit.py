"""What the tests of feedback share: good records, and a library with a database that takes them in."""

import os
from pathlib import Path
from typing import Any

import msgspec

from buffers.example import Example, parse
from daemon import ingest
from daemon.config import Config, Engine, Model
from daemon.ingest.outcome import Outcome
from daemon.state import quarantine, records
from daemon.state.database import Connection, open_database
from daemon.state.files import Finished, Signature
from daemon.trust.policy import Source, Trust

NOW = 1_800_000_000.0
NAME = "feedback/npc/game/events.jsonl"


def uuid7(number: int) -> str:
    """A UUIDv7 that tells its number."""
    return f"01990000-{number >> 16 & 0xFFFF:04x}-7{number & 0xFFF:03x}-8000-{number:012x}"


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
