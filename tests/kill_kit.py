"""What the kill tests share: a daemon as a child process, drops on disk, and the oracle that must hold afterwards."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from buffers import experience
from daemon import publish
from daemon.state import audit, runs
from daemon.state.database import open_read_only

HERE = Path(__file__).resolve().parent


def write_drop(directory: Path, name: str, numbers: range, model: str = "npc") -> None:
    """A writer's file, written under a hidden name and renamed."""
    folder = directory / "library" / "content" / model
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": f"Where is door {n}?", "completion": f"In hall {n}."}) for n in numbers]
    hidden = folder / f".{name}.part"
    hidden.write_text("\n".join(lines) + "\n")
    hidden.rename(folder / name)


class Child:
    """A process that is started again and again, as systemd does."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._command, self._log = command, log
        self._environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self, **environment: str) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=HERE.parent,
                env={**self._environment, **environment},
            )  # fmt: skip
        self.starts += 1

    def keep(self) -> None:
        """Start it if it does not run."""
        if self.process is None or self.process.poll() is not None:
            self.start()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


def scripted(directory: Path) -> Child:
    return Child([sys.executable, str(HERE / "scripted_daemon.py"), str(directory)], directory / "daemon.log")


def wait(condition: Callable[[], object], seconds: float, what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            words = log.read_text("utf-8", "replace")[-3000:] if log is not None and log.exists() else ""
            raise AssertionError(f"not within {seconds:.0f} s: {what}\n{words}")
        time.sleep(0.02)


def look(directory: Path) -> sqlite3.Connection | None:
    try:
        return open_read_only(directory / "state" / "eternad.db")
    except FileNotFoundError:
        return None


def consumed(directory: Path) -> int:
    """How many training examples have been learned."""
    database = look(directory)
    if database is None:
        return 0
    try:
        row = database.execute("SELECT count(*) FROM example WHERE state = 'consumed' AND split = 'train'").fetchone()
        return int(row[0])
    except sqlite3.OperationalError:
        return 0  # the first migrations are still being made
    finally:
        database.close()


def check_oracle(directory: Path, dropped: int, model: str = "npc") -> None:
    """Every example in exactly one place and learned by exactly one served version; nothing half done is visible."""
    database = look(directory)
    assert database is not None
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert audit.broken_at(database) is None
    states = database.execute("SELECT state, count(*) FROM example WHERE model = ? GROUP BY 1", (model,)).fetchall()
    assert states == [("consumed", dropped)]
    learned: list[int] = []
    for version in runs.versions(database, model):
        manifest = publish.verify(publish.directory_of(directory / "state" / "versions", model, version.number))
        assert manifest.run_id == version.run_id
        rows = experience.read(directory / "state" / "runs" / version.run_id / "experience.jsonl")
        learned += [row.id for row in rows if row.role in ("new", "heldout_new")]
        assert version.state in ("live", "superseded")
    assert len(learned) == len(set(learned)) == dropped
    assert not runs.active(database)
    on_disk = {path.name for path in (directory / "state" / "versions" / model).iterdir()}
    assert on_disk == {f"{version.number:04d}" for version in runs.versions(database, model)}
    database.close()
