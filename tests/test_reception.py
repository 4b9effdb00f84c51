"""Feedback by version: what players said about the answers of each."""

import time
from pathlib import Path

import msgspec
import pytest
from operator_kit import make_config, make_state, snapshot

from daemon.config import load
from daemon.state import records
from daemon.state.database import open_database, open_read_only, transaction
from daemon.state.reception import Reception, by_version
from daemon.state.records import RecordRow
from daemon.web import pages

SAID = [
    ("npc-0001", "boolean", "thumb", True), ("npc-0001", "boolean", "thumb", False),
    ("npc-0002", "boolean", "thumb", True), ("npc-0002", "float", "fun", 0.25),
    ("npc-0002", "float", "fun", 0.75), ("", "comment", "", "nice <b>"),
]  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A state with a past, and feedback on its versions; one record was withdrawn."""
    state = make_state(tmp_path)
    connection = open_database(state / "eternad.db")
    with transaction(connection):
        rows = [row(number, *each) for number, each in enumerate(SAID)]
        rows.append(msgspec.structs.replace(row(99, "npc-0002", "boolean", "thumb", False), state="retracted"))
        records.add(connection, rows, time.time())
    connection.close()
    return tmp_path


def row(number: int, version: str, kind: str, metric: str, value: object) -> RecordRow:
    inference = {"inference": {"id": "i", "adapter": version}} if version else {}
    body = msgspec.json.encode({"kind": kind, "value": value, **({"metric": metric} if metric else {}), **inference})
    return RecordRow(
        model="npc", id=str(number), kind=kind, source="hall", subject="h:1", body_sha256="", body=body, state="stored"
    )  # fmt: skip


def test_records_are_counted_by_version_kind_and_metric(directory: Path) -> None:
    """Shares and means; a withdrawn record does not count, one without a version stands by itself."""
    assert by_version(open_read_only(directory / "state" / "eternad.db"), "npc") == [
        Reception("npc-0002", "boolean", "thumb", 1, 1.0), Reception("npc-0002", "float", "fun", 2, 0.5),
        Reception("npc-0001", "boolean", "thumb", 2, 0.5), Reception("", "comment", "", 1, None),
    ]  # fmt: skip


def test_only_the_latest_are_looked_at(directory: Path) -> None:
    """So that a page over millions of records takes no longer."""
    found = by_version(open_read_only(directory / "state" / "eternad.db"), "npc", records=3)
    assert sum(each.records for each in found) == 3
    assert "npc-0001" not in {each.version for each in found}


def test_the_page_of_a_model_shows_it(directory: Path) -> None:
    """Beside everything else that is known of the model."""
    database = open_read_only(directory / "state" / "eternad.db")
    shown = pages.model(load(make_config(directory)), database, snapshot(), "npc")
    assert [each.version for each in shown["reception"]] == ["npc-0002", "npc-0002", "npc-0001", ""]
