"""The service: from what waits to what is served, whatever goes wrong on the way."""

import os
import queue
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from service_kit import MemoryEngine, drop, make_config, report, turn_until, use_trainer

from buffers import claims, journal
from buffers.policy import Buffer
from buffers.replay_buffer import members
from daemon.config import Schedule
from daemon.control import Action, Command, Order, Reply
from daemon.service import Service, serving
from daemon.state import runs
from daemon.state.database import transaction
from strategies.request import Training, read_request

Make = Callable[..., Service]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> MemoryEngine:
    memory = MemoryEngine()
    monkeypatch.setattr(serving, "build", lambda *settings: memory)
    return memory


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_trainer(tmp_path / "lab", monkeypatch)
    return tmp_path / "lab"


@pytest.fixture
def make(tmp_path: Path, lab: Path, engine: MemoryEngine) -> Iterator[Make]:
    """Opens the same state again and again: each call is a restart of the daemon."""
    opened: list[Service] = []

    def close() -> None:
        for service in opened:
            service.updates.stop()
            service.house.close()
        opened.clear()

    def start(**model: Any) -> Service:
        close()
        service = Service(make_config(tmp_path, **model), tmp_path / "eternad.toml")
        opened.append(service)
        return service

    yield start
    close()


def state_of(service: Service) -> str:
    return runs.recent(service.house.database, "npc", 1)[0].state


def order(service: Service, action: Action, **fields: Any) -> Reply:
    command = Command(Order(action=action, **fields), actor="uid:0")
    service.orders.carry_out(command)
    return command.wait(0.1)


def learn(service: Service, numbers: range) -> None:
    """One update from drop to live."""
    before = len(runs.recent(service.house.database, "npc", 1000))
    drop(service, numbers)
    turn_until(service, lambda: len(runs.recent(service.house.database, "npc", 1000)) > before)
    turn_until(service, lambda: state_of(service) == "LIVE")


def test_what_was_hard_is_remembered_when_its_version_goes_live(make: Make, lab: Path) -> None:
    """The policy `surprise` asks the trainer for losses, and they become durable with the version they belong to."""
    reported = msgspec.structs.replace(report(1.0), example_losses=[(2, 2.5), (3, 0.5)], example_tokens=[(2, 9)])
    (lab / "good.json").write_bytes(msgspec.json.encode(reported))
    service = make(buffer=Buffer(policy="surprise", uniform_share=0.0))
    learn(service, range(8))
    (run,) = runs.recent(service.house.database, "npc", 5)
    assert read_request(service.updates.directory(run)).report_losses
    assert members(service.house.database, "npc", Buffer(policy="surprise", uniform_share=0.0))[:2] == [2, 3]
    assert service.house.database.execute("SELECT tokens FROM example WHERE id = 2").fetchone() == (9,)


def test_a_refused_rebase_is_not_tried_again(make: Make, lab: Path) -> None:
    """Every second update begins with a fresh adapter; when the gate refuses it, the same examples go the usual way."""
    service = make(training=Training(rebase_every_updates=2))
    learn(service, range(8))
    (lab / "orders").write_text("bad")
    drop(service, range(8, 16))
    turn_until(service, lambda: state_of(service) == "REJECTED")
    (lab / "orders").unlink()
    service.updates.start("npc", "manual")
    turn_until(service, lambda: state_of(service) == "LIVE")
    latest = runs.recent(service.house.database, "npc", 5)[::-1]
    requests = [read_request(service.updates.directory(run)) for run in latest]
    assert [(request.update_number, request.rebase) for request in requests] == [(1, False), (2, True), (2, False)]


def test_a_drop_becomes_the_live_version(make: Make, engine: MemoryEngine) -> None:
    """Ten examples, one run, one version, one flip of the alias; nothing waits afterwards."""
    service = make()
    learn(service, range(10))
    assert engine.table == {"npc": "npc@0001"}
    assert journal.counts(service.house.database, "npc") == {"heldout/consumed": 1, "train/consumed": 9}
    run = runs.recent(service.house.database, "npc")[0]
    assert run.version == 1
    assert run.verdict is not None
    assert run.verdict["outcome"] == "accepted"
    assert run.cut is not None
    assert run.cut["rows"] == {"new": 9, "heldout_new": 1}


def test_the_second_update_continues_from_the_first(make: Make, engine: MemoryEngine) -> None:
    """Its parent is version 1, and version 1 is superseded but still loaded for a rollback."""
    service = make()
    learn(service, range(10))
    learn(service, range(10, 20))
    first, second = reversed(runs.versions(service.house.database, "npc"))
    assert (second.parent, second.state, first.state) == (1, "live", "superseded")
    assert set(engine.adapters) == {"npc@0001", "npc@0002"}


def test_a_rejected_candidate_never_serves(make: Make, engine: MemoryEngine, lab: Path) -> None:
    """No version, no flip; its examples wait, and are not tried again at once."""
    (lab / "orders").write_text("bad")
    service = make()
    drop(service, range(10))
    turn_until(service, lambda: runs.recent(service.house.database, "npc"))
    turn_until(service, lambda: state_of(service) == "REJECTED")
    for _ in range(5):
        service.tick(time.time())
    assert engine.history == ["base"]
    assert runs.versions(service.house.database, "npc") == []
    assert claims.pending(service.house.database, "npc").train == 9
    assert len(runs.recent(service.house.database, "npc")) == 1


def test_after_three_failures_the_examples_are_set_aside(make: Make, lab: Path) -> None:
    """An operator who has mended the cause can have them tried again."""
    (lab / "orders").write_text("fail")
    service = make()
    drop(service, range(10))
    for attempt in range(3):
        reply = order(service, "update", model="npc")
        assert reply.ok, reply.text
        turn_until(service, lambda: state_of(service) == "FAILED")
        assert "non_finite_loss" in runs.recent(service.house.database, "npc", 1)[0].reason
        assert len(runs.recent(service.house.database, "npc")) == attempt + 1
    assert journal.counts(service.house.database, "npc") == {"heldout/rejected": 1, "train/rejected": 9}
    last = runs.recent(service.house.database, "npc", 1)[0].id
    assert order(service, "requeue", run_id=last).detail == {"examples": 10}
    (lab / "orders").write_text("")
    assert order(service, "update", model="npc").ok
    turn_until(service, lambda: state_of(service) == "LIVE")


def test_a_trainer_that_keeps_dying_fails_the_run_but_not_its_examples(make: Make, lab: Path) -> None:
    """Three attempts, then FAILED with the signal; what is wrong with the machine is not held against the data."""
    (lab / "orders").write_text("crash")
    service = make()
    drop(service, range(10))
    turn_until(service, lambda: runs.recent(service.house.database, "npc"))
    turn_until(service, lambda: state_of(service) == "FAILED")
    assert (lab / "trained").read_text().split() == ["npc-00001"] * 3
    assert "SIGKILL" in runs.recent(service.house.database, "npc", 1)[0].reason
    assert claims.pending(service.house.database, "npc").train == 9


def test_one_trainer_at_a_time(make: Make, lab: Path, tmp_path: Path) -> None:
    """A second model's run waits until the first is done with the GPU."""
    (lab / "orders").write_text("slow")
    service = make()
    service.house.config.models["book"] = service.house.config.models["npc"]
    drop(service, range(10))
    drop(service, range(10, 20), "book")
    turn_until(service, lambda: len(runs.active(service.house.database)) == 2)
    for _ in range(5):
        service.tick(time.time())
    assert sorted(run.state for run in runs.active(service.house.database)) == ["PENDING", "TRAINING"]


def test_an_interrupted_run_goes_on_after_the_restart(make: Make, lab: Path) -> None:
    """SIGTERM in mid-training is no failure and costs no attempt."""
    (lab / "orders").write_text("slow")
    service = make()
    drop(service, range(10))
    turn_until(service, lambda: runs.recent(service.house.database, "npc"))
    turn_until(service, lambda: (lab / "trained").exists())
    time.sleep(0.3)  # until the child has its signal handler
    service.updates.stop()
    run = runs.recent(service.house.database, "npc", 1)[0]
    assert (run.state, run.attempts) == ("PENDING", 0)
    (lab / "orders").write_text("")
    again = make()
    turn_until(again, lambda: state_of(again) == "LIVE")


def test_an_engine_that_is_down_gets_the_version_later(make: Make, engine: MemoryEngine) -> None:
    """The version stays desired; nothing is trained twice."""
    service = make()
    engine.fault = "unavailable"
    drop(service, range(10))
    turn_until(service, lambda: runs.recent(service.house.database, "npc"))
    turn_until(service, lambda: state_of(service) == "PUBLISHED")
    service.tick(time.time())
    assert "connection refused" in service.serving.notes()["npc"]["detail"]
    engine.fault = ""
    turn_until(service, lambda: state_of(service) == "LIVE")
    assert engine.table == {"npc": "npc@0001"}


@pytest.mark.parametrize("fault", ["refuses", "lies"])
def test_an_engine_that_refuses_or_lies_keeps_the_old_version(make: Make, engine: MemoryEngine, fault: str) -> None:
    """A 200 proves nothing: the probe does. The run fails with the reason, the live version goes on serving."""
    service = make()
    learn(service, range(10))
    engine.fault = fault
    drop(service, range(10, 20))
    turn_until(service, lambda: state_of(service) == "FAILED")
    assert engine.table == {"npc": "npc@0001"}
    live = runs.live_version(service.house.database, "npc")
    assert live is not None
    assert live.number == 1
    assert runs.versions(service.house.database, "npc")[0].state == "failed"
    engine.fault = ""
    assert order(service, "update", model="npc").ok
    turn_until(service, lambda: engine.table == {"npc": "npc@0003"})


def test_a_damaged_version_is_never_loaded(make: Make, engine: MemoryEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that flipped between publishing and loading fails the run; the engine never sees the file."""
    service = make()
    engine.fault = "unavailable"
    drop(service, range(10))
    turn_until(service, lambda: runs.recent(service.house.database, "npc"))
    turn_until(service, lambda: state_of(service) == "PUBLISHED")
    weights = service.serving.directory("npc", 1) / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    engine.fault = ""
    turn_until(service, lambda: state_of(service) == "FAILED")
    assert "adapter_model.safetensors" in runs.recent(service.house.database, "npc", 1)[0].reason
    assert engine.adapters == {}


def test_an_engine_that_was_restarted_serves_the_live_version_again(make: Make, engine: MemoryEngine) -> None:
    """Reconciled without a hand."""
    service = make()
    learn(service, range(10))
    engine.restart()
    service.serving._next.clear()
    turn_until(service, lambda: engine.table == {"npc": "npc@0001"})


def test_an_engine_that_hangs_does_not_stop_the_intake(make: Make, engine: MemoryEngine) -> None:
    """While an engine keeps a request waiting, the loop turns on; then the version goes live."""
    service = make()
    engine.hang.clear()
    drop(service, range(10))
    turn_until(service, lambda: runs.recent(service.house.database, "npc"))
    turn_until(service, lambda: state_of(service) == "PUBLISHED")
    started = time.monotonic()
    for _ in range(5):
        service.tick(time.time())
    assert time.monotonic() - started < 5
    assert state_of(service) == "PUBLISHED"
    engine.hang.set()
    turn_until(service, lambda: state_of(service) == "LIVE")


def test_rollback_and_forward(make: Make, engine: MemoryEngine) -> None:
    """By default to the version before; by number to any; 0 is the base; nonsense is refused in words."""
    service = make()
    learn(service, range(10))
    learn(service, range(10, 20))
    assert order(service, "rollback", model="npc").ok
    assert engine.table == {"npc": "npc@0001"}
    assert journal.counts(service.house.database, "npc")["train/rejected"] == 9
    assert order(service, "rollback", model="npc", version=2).ok
    assert engine.table == {"npc": "npc@0002"}
    assert order(service, "rollback", model="npc", version=0).ok
    assert engine.table == {"npc": "base"}
    assert "no version 9" in order(service, "rollback", model="npc", version=9).text
    assert "nothing to roll back" in order(service, "rollback", model="npc").text
    assert "no model `nps`" in order(service, "rollback", model="nps").text


def test_pause_holds_updates_back_and_survives_a_restart(make: Make) -> None:
    """Ingest goes on, updates wait; a manual update is still possible."""
    service = make()
    assert order(service, "pause").ok
    drop(service, range(10))
    again = make()
    again.tick(time.time())
    assert runs.recent(again.house.database, "npc") == []
    assert order(again, "resume").ok
    turn_until(again, lambda: runs.recent(again.house.database, "npc"))


def test_a_manual_update_says_what_it_does(make: Make, lab: Path) -> None:
    """Nothing waits; a run starts; a run is at work already; it is cancelled."""
    (lab / "orders").write_text("slow")
    service = make(schedule=Schedule(threshold_examples=1000))
    assert "nothing waits" in order(service, "update", model="npc").text
    drop(service, range(3))
    assert order(service, "update", model="npc").detail == {"run": "npc-00001"}
    turn_until(service, lambda: state_of(service) == "TRAINING")
    assert "still at work" in order(service, "update", model="npc").text
    assert order(service, "cancel", run_id="npc-00001").ok
    assert state_of(service) == "CANCELLED"
    assert claims.pending(service.house.database, "npc").train == 3
    assert "no run" in order(service, "cancel", run_id="npc-00009").text


def test_no_update_starts_on_a_full_disk(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the floor nothing is begun; above it the run begins by itself."""
    service = make()
    drop(service, range(10))
    monkeypatch.setattr(Service, "disk_is_low", lambda self: True)
    service.tick(time.time())
    assert runs.recent(service.house.database, "npc") == []
    monkeypatch.undo()


def test_a_broken_step_fails_the_run_and_the_daemon_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw is one run's end, with the error in its reason."""
    service = make()
    drop(service, range(10))
    monkeypatch.setattr("daemon.gate.judge", lambda *_: 1 / 0)
    turn_until(service, lambda: runs.recent(service.house.database, "npc"))
    turn_until(service, lambda: state_of(service) == "FAILED")
    assert "ZeroDivisionError" in runs.recent(service.house.database, "npc", 1)[0].reason
    service.tick(time.time())


def test_orders_are_obeyed_between_two_turns(make: Make) -> None:
    """The loop's pause ends early for an order."""
    service = make()
    command = Command(Order(action="pause"))
    service.commands.put(command)
    service.wait(0.2)
    assert command.wait(0.01).text == "all models: updates are held back"
    with pytest.raises(queue.Empty):
        service.commands.get_nowait()
    with transaction(service.house.database) as connection:
        assert connection.execute("SELECT value FROM setting WHERE name = 'paused/'").fetchone() == ("1",)


def test_old_versions_go_but_never_one_that_is_loaded(make: Make, engine: MemoryEngine) -> None:
    """Of five versions the newest two, the live one's parent and what the engine lists stay; a dry run says so."""
    service = make(versions_kept=2)
    for start in range(0, 50, 10):
        learn(service, range(start, start + 10))
    engine.adapters["npc@0001"] = "whoever loaded it"
    plan = order(service, "gc", dry_run=True)
    assert "versions/npc/0002 (old_version)" in plan.text and "npc/0001 " not in plan.text
    assert plan.detail is not None and all(Path(path).exists() for path in plan.detail["paths"])
    reply = order(service, "gc")
    assert reply.ok and reply.detail == {"removed": len(plan.detail["paths"])}, reply.text
    on_disk = sorted(path.name for path in (service.house.versions / "npc").iterdir())
    assert on_disk[-2:] == ["0004", "0005"]
    assert "0001" in on_disk
    assert "0002" not in on_disk
    states = {version.number: version.state for version in runs.versions(service.house.database, "npc")}
    assert states[2] == "removed"
    assert "no version 2" in order(service, "rollback", model="npc", version=2).text


def test_nothing_is_removed_while_the_engine_does_not_say_what_it_has(make: Make, engine: MemoryEngine) -> None:
    """What cannot be known to be unused is kept."""
    service = make(versions_kept=2)
    for start in range(0, 40, 10):
        learn(service, range(start, start + 10))
    engine.fault = "unavailable"
    assert order(service, "gc").ok
    assert len(list((service.house.versions / "npc").iterdir())) == 4


def test_a_signal_never_makes_a_pause_endless(make: Make) -> None:
    """Signals that come just as a pause ends: CPython 3.11's SimpleQueue waited for ever then, deaf to SIGTERM."""
    service = make()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    sender = subprocess.Popen(["sh", "-c", f"while kill -USR1 {os.getpid()}; do sleep 0.001; done"])
    try:
        for _ in range(300):
            service.wait(0.002)
    finally:
        sender.kill()
        sender.wait()
        signal.signal(signal.SIGUSR1, before)
