"""Erasure while a run uses the data: the run is ended, and the next one learns the rest without it."""

import time
from pathlib import Path

from faults_kit import Make, engine_fixture, lab_fixture, make_fixture, state_of
from service_kit import turn_until

from buffers import experience, journal
from buffers.example import Example, Origin
from daemon.control import Command, Order
from daemon.state import runs
from daemon.state.database import transaction
from daemon.trust.policy import Trust

__all__ = ["engine_fixture", "lab_fixture", "make_fixture"]

ALICE, BOB = "h:alice-0123456789", "h:bob-0123456789"


def test_a_run_that_uses_the_data_is_ended_and_the_next_learns_without_it(make: Make, lab: Path) -> None:
    """The answer says which run was ended; the version that follows has never seen the subject's data."""
    service = make(None, {"trust": Trust(subject_share=1.0)})
    items = [
        (Example(shape="demonstration", prompt=f"q{n}", completion=f"a{n}"),
         Origin(file="f.jsonl", line=n, subject=ALICE if n % 4 == 0 else BOB, record_id=str(n)))
        for n in range(20)
    ]  # fmt: skip
    with transaction(service.house.database) as connection:
        journal.add(connection, "npc", items, heldout_fraction=0.1, now=time.time())
    (lab / "orders").write_text("slow")
    turn_until(service, lambda: state_of(service) == "TRAINING")
    command = Command(Order(action="erase", subject=ALICE), actor="uid:0")
    service.orders.carry_out(command)
    reply = command.wait()
    assert reply.ok and "begin again without: npc-00001" in reply.text
    (lab / "orders").write_text("")
    turn_until(service, lambda: state_of(service) == "LIVE")
    assert [run.state for run in runs.recent(service.house.database, "npc")] == ["LIVE", "CANCELLED"]
    learned = list(experience.read(service.house.runs / "npc-00002" / "experience.jsonl"))
    assert len(learned) == 15
    assert "q4" not in (service.house.runs / "npc-00002" / "experience.jsonl").read_text()
