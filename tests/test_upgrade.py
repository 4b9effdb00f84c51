"""A state that an earlier eternad left (`recorded/`: its real database and files), taken over by the present one.

Recorded by running commit 8c9e2a7 of 2026-11-22, whose database had the first four migrations: two versions are
published, a third candidate was rejected, a fourth run was interrupted in mid-training; three feedback records, one of
which is only stored; one file in the quarantine.
"""

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kill_kit import Child, look, scripted, wait, write_drop
from service_kit import prepare_lab

from daemon import publish
from daemon.state import audit, runs
from daemon.state.database import MIGRATIONS

RECORDED = Path(__file__).parent / "recorded" / "2026-11-22"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The recorded directory as it was left, at another place: as after a restored backup."""
    shutil.copytree(RECORDED / "library", tmp_path / "library")
    for name in ("runs", "versions"):
        shutil.copytree(RECORDED / name, tmp_path / "state" / name)
    shutil.copy(RECORDED / "eternad.toml", tmp_path / "eternad.toml")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    database = sqlite3.connect(tmp_path / "state" / "eternad.db")
    database.executescript((RECORDED / "eternad.sql").read_text())
    assert database.execute("SELECT count(*) FROM migration").fetchone() == (4,)
    database.close()
    prepare_lab(tmp_path / "lab")
    return tmp_path


def eternad(place: Path, *command: str) -> Any:
    """What the present program says to a command, as JSON."""
    whole = [sys.executable, "-m", "daemon", *command, "--json", "--config", str(place / "eternad.toml")]
    return json.loads(subprocess.run(whole, capture_output=True, text=True, timeout=60, check=True).stdout)


def started(place: Path) -> Child:
    """The present daemon over the recorded state, ready."""
    daemon = scripted(place)
    daemon.start()
    wait(lambda: "ready" in (place / "daemon.log").read_text(), 30, "the daemon is ready", place / "daemon.log")
    return daemon


def test_a_recorded_state_is_taken_over_and_goes_on(place: Path) -> None:
    """Nothing is lost, learned twice or doubted: the interrupted run goes live, and so does a fresh drop."""
    daemon = started(place)
    wait(lambda: live(place) == 3, 30, "the interrupted run is live", place / "daemon.log")
    write_drop(place, "d.jsonl", range(100, 110))
    wait(lambda: live(place) == 4, 30, "the next drop is live", place / "daemon.log")
    assert daemon.stop() == 0
    database = look(place)
    assert database is not None
    assert {row[0] for row in database.execute("SELECT name FROM migration")} == {name for name, _ in MIGRATIONS}
    assert audit.broken_at(database) is None
    found = [(version.number, version.state) for version in runs.versions(database, "npc")]
    assert found == [(4, "live"), (3, "superseded"), (2, "superseded"), (1, "superseded")]
    for number, _ in found:
        publish.verify(publish.directory_of(place / "state" / "versions", "npc", number))
    assert database.execute("SELECT state, count(*) FROM example GROUP BY 1").fetchall() == [("consumed", 43)]
    assert database.execute("SELECT kind, state FROM record ORDER BY id").fetchall() == [
        ("demonstration", "journal"), ("boolean", "journal"), ("comment", "stored"),
    ]  # fmt: skip
    database.close()


def test_a_recorded_state_is_shown_checked_and_rolled_back(place: Path) -> None:
    """Its runs, versions and refusals read as they did, doctor finds nothing bad, its first version serves again."""
    daemon = started(place)
    try:
        wait(lambda: live(place) == 3, 30, "the interrupted run is live", place / "daemon.log")
        states = [run["state"] for run in eternad(place, "history")]
        assert states == ["LIVE", "REJECTED", "SUPERSEDED", "SUPERSEDED"]
        assert [each["code"] for each in eternad(place, "quarantine", "ls")] == ["binary"]
        assert [each for each in eternad(place, "doctor")["findings"] if each["level"] == "bad"] == []
        eternad(place, "rollback", "npc", "1")
        wait(lambda: served(place) == 1, 20, "version 1 serves", place / "daemon.log")
    finally:
        assert daemon.stop() == 0


def live(place: Path) -> int:
    """The version that should be served."""
    database = look(place)
    assert database is not None
    version = runs.live_version(database, "npc")
    database.close()
    return 0 if version is None else version.number


def served(place: Path) -> int | None:
    """The version that the engine serves."""
    [model] = eternad(place, "status")["models"]
    version: int | None = model["engine_serves"]
    return version
