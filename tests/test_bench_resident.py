"""The measurement of the idle daemon, small: the rows are there, READY comes, the figures are the process's own."""

from pathlib import Path

from bench.resident import fill, measure
from buffers import claims
from daemon.state.database import open_read_only


def test_the_journal_has_so_many_learned_examples(tmp_path: Path) -> None:
    """Each with a hash of its own, all consumed."""
    fill(tmp_path, 500)
    database = open_read_only(tmp_path / "eternad.db")
    counted = database.execute("SELECT count(*), count(DISTINCT hash) FROM example WHERE state = 'consumed'").fetchone()
    assert counted == (500, 500)
    assert claims.pending(database, "npc").train == 0


def test_a_daemon_is_measured(tmp_path: Path) -> None:
    """One line with all the figures."""
    said = measure(tmp_path, 500, 0.5, settle=0.5)
    assert said.startswith("500 examples: READY in ") and "MiB resident" in said
