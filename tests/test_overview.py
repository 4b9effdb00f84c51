"""What the command line, the page and the metrics share: the overview's counts and the words for numbers."""

import time
from pathlib import Path

from operator_kit import make_state

from buffers import journal
from daemon import wording
from daemon.state import summary
from daemon.state.database import open_database


def test_durations_and_sizes_are_for_people() -> None:
    """One number and a unit."""
    assert [wording.duration(each) for each in (-1, 8, 90, 200, 9000, 400000)] == [
        "0 s", "8 s", "90 s", "3 min", "2 h", "5 days",
    ]  # fmt: skip
    assert [wording.size(each) for each in (7, 2048, 3 << 20, 5 << 40)] == ["7 B", "2.0 KiB", "3.0 MiB", "5.0 TiB"]
    assert wording.ago(None) == "never" and wording.ago(time.time() - 120).endswith("ago")


def test_the_quick_counts_are_the_journals_own(tmp_path: Path) -> None:
    """Derived from the running totals, in any mixture of states."""
    connection = open_database(make_state(tmp_path) / "eternad.db")
    connection.execute("UPDATE example SET state = 'retracted' WHERE id IN (3, 11)")
    for model in ("npc", "book"):
        assert summary.example_counts(connection, model) == journal.counts(connection, model)
    connection.close()
