"""What a person decides about people's data, as orders of the daemon: accept, reject, erase; and how the command line
and the page show what waits."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from operator_kit import make_config

from buffers import claims
from daemon import cli
from daemon.cli import context
from daemon.config import load
from daemon.control import Command, Order, Reply
from daemon.service.desk import Desk
from daemon.service.house import House
from daemon.service.orders import CannotBeDone
from daemon.state import records
from daemon.state.database import transaction
from daemon.state.records import RecordRow
from daemon.web import pages

SUBJECT = "h:0123456789abcdef"


def body(identity: str) -> bytes:
    return msgspec.json.encode(
        {
            "schema": "eternad.feedback/1", "id": identity, "ts": "2026-11-22T20:00:00Z", "kind": "boolean",
            "model": "npc", "input": {"messages": [{"role": "user", "content": f"{identity}?"}]},
            "output": {"messages": [{"role": "assistant", "content": "Shown.\x1b[31m"}]}, "metric": "thumb",
            "value": True, "subject": {"id": SUBJECT},
            "source": {"app": "game", "channel": "hall", "reporter": "player"},
        }
    )  # fmt: skip


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A daemon's state with two records that wait for review."""
    path = make_config(tmp_path)
    monkeypatch.setenv("ETERNAD_CONFIG", str(path))
    found = House(load(path))
    rows = [
        RecordRow(
            model="npc", id=f"01990000-0000-7000-8000-00000000000{number}", kind="boolean", source="game",
            subject=SUBJECT, body_sha256=str(number), body=body(f"01990000-0000-7000-8000-00000000000{number}"),
            state="held", reason="free text of a player",
        )
        for number in (1, 2)
    ]  # fmt: skip
    with transaction(found.database):
        records.add(found.database, rows, 1.0)
    yield found
    found.close()


def told(house: House, **order: Any) -> Reply:
    """The answer to an order, as the loop would give it."""
    command = Command(Order(**order), actor="uid:7")
    text, detail = Desk(house, print).actions()[command.order.action](command)
    command.answer(text, **detail)
    return command.wait()


FIRST, SECOND = (f"01990000-0000-7000-8000-00000000000{number}" for number in (1, 2))


def test_an_accepted_record_is_learned_from_and_a_rejected_one_never(house: House) -> None:
    """Both leave the queue."""
    assert told(house, action="accept", model="npc", record_id=FIRST).detail == {"examples": 1}
    assert "nothing is learned" in told(house, action="reject", model="npc", record_id=SECOND).text
    assert claims.pending(house.database, "npc").train == 1
    assert records.held(house.database) == []


def test_what_is_not_held_cannot_be_decided(house: House) -> None:
    """A sentence that says what it is instead, and where to look."""
    told(house, action="reject", model="npc", record_id=FIRST)
    for action in ("accept", "reject"):
        with pytest.raises(CannotBeDone, match="it is rejected"):
            told(house, action=action, model="npc", record_id=FIRST)
        with pytest.raises(CannotBeDone, match="eternad review ls"):
            told(house, action=action, model="nobody", record_id=FIRST)


def test_a_subject_is_erased_and_the_answer_says_what_went(house: House) -> None:
    """Records and examples, and the versions that have learned from them."""
    told(house, action="accept", model="npc", record_id=FIRST)
    reply = told(house, action="erase", subject=SUBJECT)
    assert reply.detail == {"records": 2, "examples": 1, "versions": {}}
    assert "versions that have learned from them: none" in reply.text
    with pytest.raises(CannotBeDone, match="a subject is"):
        told(house, action="erase", subject="mallory@example.org")


def test_the_command_line_lists_and_shows_what_waits(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason, and without obeying what a player wrote."""
    assert cli.main(["review", "ls"]) == 0
    listed = capsys.readouterr().out
    assert FIRST in listed and "free text of a player" in listed
    assert cli.main(["review", "show", "npc", FIRST]) == 0
    shown = capsys.readouterr().out
    assert "boolean from game, held" in shown and '"thumb"' in shown and "\x1b" not in shown
    assert cli.main(["review", "ls", "book", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert cli.main(["review", "show", "npc", SECOND, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["body"]["metric"] == "thumb"
    assert cli.main(["review", "show", "npc", "unknown"]) == 1
    assert cli.main(["erase", "--subject", "mallory", "--yes"]) == 2
    assert context.printable(records.held(house.database)[0])["id"] == FIRST


def test_the_page_lists_what_waits(house: House) -> None:
    """Beside the quarantine."""
    assert [row.id for row in pages.quarantine_page(house.database)["held"]] == [FIRST, SECOND]
