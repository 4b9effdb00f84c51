"""The database: migrations, legal moves, lineage, and an audit log that shows tampering."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from buffers import claims, journal
from buffers.example import Example, Origin
from daemon.state import audit, runs
from daemon.state.database import (
    MIGRATIONS,
    NewerDatabase,
    migrate,
    open_database,
    open_read_only,
    set_setting,
    setting,
    transaction,
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = open_database(tmp_path / "eternad.db")
    yield connection
    connection.close()


def drop(connection: sqlite3.Connection, numbers: range) -> None:
    items = [(Example(shape="text", completion=f"text {n}"), Origin(file="f")) for n in numbers]
    with transaction(connection):
        journal.add(connection, "npc", items, heldout_fraction=0.0)


def new_run(connection: sqlite3.Connection, parent: int | None = None) -> runs.Run:
    with transaction(connection):
        run = runs.create(connection, "npc", "manual", parent, 100)
    assert run is not None
    return run


def advance(connection: sqlite3.Connection, run: runs.Run, *states: runs.RunState) -> runs.Run:
    with transaction(connection):
        for state in states:
            run = runs.move(connection, run, state)
    return run


def serve_new(connection: sqlite3.Connection, numbers: range) -> int:
    """One whole update, as the service makes it."""
    drop(connection, numbers)
    live = runs.live_version(connection, "npc")
    run = new_run(connection, live.number if live else None)
    run = advance(connection, run, "TRAINING", "TRAINED", "EVALUATING", "ACCEPTED")
    number = runs.next_version(connection, "npc")
    with transaction(connection):
        runs.publish(connection, run, number, "sha")
        run = runs.move(connection, run, "PUBLISHED", version=number)
    with transaction(connection):
        claims.consume(connection, run.id, run.update_number)
        runs.move(connection, run, "LIVE")
        runs.serve(connection, "npc", number)
    return number


def test_every_earlier_schema_migrates(tmp_path: Path) -> None:
    """Whatever version the file was left by, opening it brings it up to date, once."""
    for known in range(len(MIGRATIONS)):
        path = tmp_path / f"{known}.db"
        connection = sqlite3.connect(path, isolation_level=None)
        whole, MIGRATIONS[:] = MIGRATIONS[:], MIGRATIONS[:known]
        try:
            migrate(connection, path)
        finally:
            MIGRATIONS[:] = whole
        assert migrate(connection, path) == [name for name, _ in MIGRATIONS[known:]]
        assert migrate(connection, path) == []
        connection.close()


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    """An older binary never writes into what it does not understand."""
    connection = open_database(tmp_path / "eternad.db")
    connection.execute("INSERT INTO migration VALUES ('state-999', 0)")
    connection.close()
    with pytest.raises(NewerDatabase, match="state-999"):
        open_database(tmp_path / "eternad.db")


def test_a_transaction_is_all_or_nothing(database: sqlite3.Connection) -> None:
    """An error in the middle leaves nothing behind and the connection usable."""
    with pytest.raises(ZeroDivisionError), transaction(database) as connection:
        set_setting(connection, "a", "1")
        raise ZeroDivisionError
    assert setting(database, "a", "none") == "none"
    with transaction(database) as connection:
        set_setting(connection, "a", "2")
    assert setting(database, "a") == "2"


def test_readers_read_beside_the_writer(database: sqlite3.Connection, tmp_path: Path) -> None:
    """`eternad status` sees the last commit while a transaction is open, and cannot write."""
    drop(database, range(3))
    reader = open_read_only(tmp_path / "eternad.db")
    with transaction(database) as connection:
        set_setting(connection, "half", "done")
        assert setting(reader, "half") == ""
        assert claims.pending(reader, "npc").train == 3
    with pytest.raises(sqlite3.OperationalError):
        set_setting(reader, "x", "y")
    reader.close()


def test_only_legal_moves(database: sqlite3.Connection) -> None:
    """A run cannot go live without having been judged, and a stale view of it moves nothing."""
    drop(database, range(3))
    run = new_run(database)
    with pytest.raises(runs.IllegalMove, match="PENDING -> LIVE"):
        advance(database, run, "LIVE")
    training = advance(database, run, "TRAINING")
    with pytest.raises(runs.IllegalMove, match="no longer PENDING"):
        advance(database, run, "CANCELLED")
    assert runs.get(database, run.id) == training
    assert [each.id for each in runs.active(database)] == [run.id]


def test_nothing_waits_no_run(database: sqlite3.Connection) -> None:
    """A run without examples does not come into being."""
    with transaction(database) as connection:
        assert runs.create(connection, "npc", "manual", None, 100) is None


def test_a_new_version_supersedes_and_numbers_grow(database: sqlite3.Connection) -> None:
    """One live version per model; the one before it is superseded, and so is its run."""
    assert [serve_new(database, range(n, n + 5)) for n in (0, 5, 10)] == [1, 2, 3]
    assert [version.state for version in runs.versions(database, "npc")] == ["live", "superseded", "superseded"]
    assert [run.state for run in runs.recent(database, "npc")] == ["LIVE", "SUPERSEDED", "SUPERSEDED"]
    assert [run.update_number for run in runs.recent(database, "npc")] == [3, 2, 1]


def test_a_rollback_takes_back_what_was_learned_since(database: sqlite3.Connection) -> None:
    """After 3 -> 1 only the examples of version 1 are rehearsed; after a roll forward to 3 all are again."""
    for start in (0, 5, 10):
        serve_new(database, range(start, start + 5))
    with transaction(database) as connection:
        runs.serve(connection, "npc", 1)
    assert [version.state for version in runs.versions(database, "npc")] == ["rolled_back", "rolled_back", "live"]
    assert journal.counts(database, "npc") == {"train/consumed": 5, "train/rejected": 10}
    assert serve_new(database, range(20, 25)) == 4
    fourth = runs.versions(database, "npc")[0]
    assert (fourth.parent, fourth.state) == (1, "live")
    with transaction(database) as connection:
        runs.serve(connection, "npc", 3)
    states = {version.number: version.state for version in runs.versions(database, "npc")}
    assert states == {1: "superseded", 2: "superseded", 3: "live", 4: "rolled_back"}
    assert journal.counts(database, "npc") == {"train/consumed": 15, "train/rejected": 5}


def test_a_rollback_to_the_base_leaves_nothing_live(database: sqlite3.Connection) -> None:
    """The base model serves; every version can still be served again."""
    serve_new(database, range(5))
    with transaction(database) as connection:
        runs.serve(connection, "npc", None)
    assert runs.live_version(database, "npc") is None
    with transaction(database) as connection:
        runs.serve(connection, "npc", 1)
    live = runs.live_version(database, "npc")
    assert live is not None
    assert live.number == 1


def test_failures_in_a_row_end_with_a_success(database: sqlite3.Connection) -> None:
    """The schedule's patience starts anew after a run that served."""
    serve_new(database, range(5))
    for start in (5, 10):
        drop(database, range(start, start + 5))
        run = new_run(database, 1)
        with transaction(database) as connection:
            runs.move(connection, run, "FAILED", "broken")
            claims.release(connection, run.id, attempts_max=3)
    assert runs.failures_in_a_row(database, "npc")[0] == 2
    serve_new(database, range(20, 25))
    assert runs.failures_in_a_row(database, "npc")[0] == 0


@pytest.mark.parametrize("change", ["UPDATE audit SET actor = 'nobody'", "DELETE FROM audit WHERE id = 1"])
def test_the_audit_log_is_append_only(database: sqlite3.Connection, change: str) -> None:
    """No statement of the program, wrong as it may be, changes or removes what stands there."""
    serve_new(database, range(5))
    before = audit.entries(database)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute(change)
    assert audit.entries(database) == before


def test_the_audit_chain_shows_a_changed_past(database: sqlite3.Connection) -> None:
    """Every move is on record; a row that is edited or removed breaks the chain at the next one."""
    serve_new(database, range(5))
    assert [entry.event for entry in audit.entries(database)][:2] == ["run.PENDING", "run.TRAINING"]
    assert audit.broken_at(database) is None
    database.execute("DROP TRIGGER audit_is_never_changed")  # whoever has the file can
    database.execute("UPDATE audit SET detail = '{}' WHERE id = 3")
    assert audit.broken_at(database) == 3
