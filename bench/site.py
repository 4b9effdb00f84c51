"""A library with its database, without a daemon: files are dropped and taken in as the daemon takes them in."""

import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from daemon import ingest
from daemon.config import Config, Engine, Model, Watch
from daemon.state.database import open_database
from daemon.state.files import Finished, Signature


class Site:
    """A library below `directory` with the game's channel `game` and the model `npc`."""

    def __init__(self, directory: Path, model: Model | None = None, **changes: Any) -> None:
        self.directory, self.library = directory, directory / "library"
        config = Config(
            library_directory=self.library, state_directory=directory / "state",
            models={"npc": model or Model(base_path=directory, engine="none")}, engines={"none": Engine()},
            watch=Watch(heldout_fraction=0.1),
        )  # fmt: skip
        self.config = msgspec.structs.replace(config, **changes)
        self.database: sqlite3.Connection = open_database(directory / "state" / "eternad.db")

    def drop(self, name: str, lines: Iterable[object], at: float) -> ingest.Outcome:
        """Write a file and take it in, all of it."""
        path = self.library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        seen = os.lstat(path)
        signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        finished = Finished(path=name, relative=name, signature=signature)
        outcome = ingest.ingest_file(self.database, self.config, finished, at)
        while outcome.state == "partial":
            outcome.count(more := ingest.ingest_file(self.database, self.config, finished, at))
            outcome.state = more.state
        return outcome

    def batch(self, name: str, rows: Iterable[object], at: float) -> ingest.Outcome:
        """One file of the game's feedback."""
        return self.drop(f"feedback/npc/game/{name}.jsonl", rows, at)
