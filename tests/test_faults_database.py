"""A damaged, a newer and a half-migrated database; `eternad doctor` on all that can be wrong with a state directory."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults_kit import Make, engine_fixture, lab_fixture, make_fixture
from operator_kit import config_fixture, eternad_fixture, state_fixture

from daemon.state import integrity
from daemon.state.database import MIGRATIONS, _statements, open_database

Eternad = Any
fixtures = (config_fixture, state_fixture, eternad_fixture, engine_fixture, lab_fixture, make_fixture)
PAGE = 4096


def write_over_header(path: Path) -> None:
    """Not a database any more."""
    path.write_bytes(b"garbage " * (path.stat().st_size // 8))


def write_over_pages(path: Path) -> None:
    """Every third page after the schema's is what another file holds."""
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // PAGE, 3):
        data[page * PAGE : (page + 1) * PAGE] = b"\xa5" * PAGE
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    """The last half is lost."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 // PAGE * PAGE])


DAMAGES: list[Callable[[Path], None]] = [write_over_header, write_over_pages, cut_off]


def run_daemon(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "daemon", "run", "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_not_worked_on(
    config: Path, state: Path, eternad: Eternad, damage: Callable[[Path], None]
) -> None:
    """The daemon ends with 74 (EX_IOERR) and a sentence that names both commands; doctor says the same."""
    damage(state / "eternad.db")
    done = run_daemon(config)
    assert done.returncode == 74, done.stderr
    assert "eternad doctor" in done.stderr and "eternad restore" in done.stderr
    assert "Traceback" not in done.stderr
    eternad("doctor", code=1)


def test_damage_that_shows_later_ends_the_daemon(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that turns out to be damaged while the daemon runs is no reason to try again and again."""
    service = make()
    (service.house.config.state_directory / "other.db").write_bytes(b"garbage " * 1000)
    other = sqlite3.connect(service.house.config.state_directory / "other.db")

    def look(_now: float) -> None:
        other.execute("SELECT * FROM run")

    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        service.patience.turn(look, time.time())
    assert service.patience.counts["turn_failures"] == 0
    other.close()


def test_looking_for_damage_takes_its_time_and_no_more(tmp_path: Path) -> None:
    """A large database is looked through for as long as the start may take."""
    connection = open_database(tmp_path / "eternad.db")
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000)"
    connection.execute(f"CREATE TABLE much AS {numbers} SELECT i, hex(randomblob(20)) AS words FROM n")
    connection.execute("CREATE INDEX much_words ON much (words)")
    started = time.monotonic()
    integrity.check_quickly(connection, 0.0)
    assert time.monotonic() - started < 5
    integrity.check_quickly(connection, 60.0)
    assert integrity.problems(connection) == []
    connection.close()


def test_a_newer_schema_is_refused_by_the_daemon(config: Path, state: Path, eternad: Eternad) -> None:
    """Exit 74, which migration is unknown and what to install; nothing is written."""
    connection = sqlite3.connect(state / "eternad.db")
    connection.execute("INSERT INTO migration VALUES ('state-999', 0)")
    connection.commit()
    connection.close()
    before = (state / "eternad.db").read_bytes()
    done = run_daemon(config)
    assert done.returncode == 74
    assert "state-999" in done.stderr and "newer eternad" in done.stderr
    assert (state / "eternad.db").read_bytes() == before
    findings = by_check(eternad, 1)
    assert "newer eternad (state-999)" in findings["schema"]["text"]


KILLED = """
import os, signal, sys
from pathlib import Path
from daemon.state import database
known, statement = int(sys.argv[2]), int(sys.argv[3])
whole, database.MIGRATIONS[:] = database.MIGRATIONS[:], database.MIGRATIONS[:known]
database.open_database(Path(sys.argv[1])).close()
database.MIGRATIONS[:] = whole
cut = database._statements
def killing(script):
    for number, each in enumerate(cut(script)):
        if number == statement:
            os.kill(os.getpid(), signal.SIGKILL)
        yield each
database._statements = killing
database.open_database(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("known", [0, 1, len(MIGRATIONS) - 1])
def test_killed_in_a_migration_the_next_start_makes_it(tmp_path: Path, known: int) -> None:
    """Between two statements of it nothing of the migration counts, and the database of before is whole."""
    for statement in (0, 1):
        path = tmp_path / f"{statement}.db"
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(known), str(statement)], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        longest = max(len(list(_statements(script))) for _, script in MIGRATIONS[known:])
        assert done.returncode == (-signal.SIGKILL if statement < longest else 0), done.stderr
        connection = open_database(path)
        assert [row[0] for row in connection.execute("SELECT name FROM migration ORDER BY rowid")] == [
            name for name, _ in MIGRATIONS
        ]
        assert integrity.problems(connection) == []
        connection.close()


def by_check(eternad: Eternad, code: int = 0) -> dict[str, dict[str, str]]:
    """The findings of `eternad doctor --json`."""
    from daemon import cli

    if code == 0:
        text = eternad("doctor", "--json")
    else:
        import contextlib
        import io

        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert cli.main(["doctor", "--json"]) == code
        text = said.getvalue()
    return {each["check"]: each for each in json.loads(text)["findings"]}


def without_a_run(state: Path) -> None:
    connection = open_database(state / "eternad.db")
    connection.execute("UPDATE run SET state = 'CANCELLED' WHERE state = 'TRAINING'")
    connection.close()


def test_doctor_finds_nothing_in_a_good_state(eternad: Eternad, config: Path, state: Path) -> None:
    """Every line is good, and nothing was changed."""
    (state.parent / "library").mkdir()
    state.chmod(0o750)
    assert {check: each["level"] for check, each in by_check(eternad).items()} == dict.fromkeys(
        ("database", "schema", "audit", "versions", "orphans", "disk", "permissions", "library"), "good"
    )
    assert "good  database" in eternad("doctor")


def test_doctor_before_the_first_start(eternad: Eternad) -> None:
    """Nothing to examine is nothing bad."""
    assert by_check(eternad)["database"]["level"] == "note"


def test_doctor_names_what_was_changed(eternad: Eternad, state: Path) -> None:
    """A bit of a version, a row of the past: each finding names it and says what to do."""
    weights = state / "versions" / "npc" / "0002" / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"Weights")
    connection = open_database(state / "eternad.db")
    connection.execute("DROP TRIGGER audit_is_never_changed")  # whoever has the file can
    connection.execute("UPDATE audit SET actor = 'nobody' WHERE id = 2")
    connection.close()
    findings = by_check(eternad, 1)
    assert {check for check, each in findings.items() if each["level"] == "bad"} == {"versions", "audit"}
    assert str(weights) in findings["versions"]["text"] and "it is live" in findings["versions"]["text"]
    assert "row 2" in findings["audit"]["text"]


def test_doctor_finds_a_version_that_was_exchanged_whole(eternad: Eternad, state: Path) -> None:
    """Files and manifest that fit each other are not enough: the database knows the manifest's hash."""
    first, second = (state / "versions" / "npc" / name for name in ("0001", "0002"))
    shutil.rmtree(second)
    shutil.copytree(first, second)
    assert "is not the one that was published" in by_check(eternad, 1)["versions"]["text"]


def test_doctor_notes_what_nothing_refers_to_and_who_can_read(eternad: Eternad, state: Path) -> None:
    """Orphan directories and an open state directory are worth knowing, no more."""
    without_a_run(state)
    (state / "versions" / "npc" / "0099").mkdir()
    (state / "runs" / "npc-00099").mkdir()
    state.chmod(0o755)
    findings = by_check(eternad)
    assert findings["orphans"]["level"] == findings["permissions"]["level"] == "note"
    assert "0099" in findings["orphans"]["text"] and "npc-00099" in findings["orphans"]["text"]
    assert "chmod o-rwx" in findings["permissions"]["text"]
