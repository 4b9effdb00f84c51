"""A trainer that waits with everything loaded: the same result, the same locks and exit codes, gone when not wanted."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from service_kit import MemoryEngine, drop, make_config, turn_until, use_trainer
from test_train import facts, make_run, start

from daemon import standby as standbys
from daemon.config import Model
from daemon.service import Service, serving
from daemon.standby import Standby, Standbys, memory_share, wanted_of
from daemon.update import Trainer, take_lock
from strategies.request import EXIT_TRAINED, RunReport, read_report

# a waiting trainer in fifteen lines: says that it was asked, works for a while, reports
FAKE = """
import os, signal, socket, sys, time
channel = socket.socket(fileno=os.dup(0))
message, descriptors, _, _ = socket.recv_fds(channel, 65536, 16)
if not message:
    sys.exit(0)
run = os.fsdecode(message)
open(run + "/started", "w").write(f"{os.getpid()} {len(descriptors)}")
def on_term(*_):
    os._exit(75)
signal.signal(signal.SIGTERM, on_term)
while not os.path.exists(run + "/go"):
    time.sleep(0.01)
os.write(descriptors[0], b"my last words\\n")
sys.exit(int(open(run + "/go").read()))
"""


def wait(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model that keeps a trainer warm; the trainer is the fake one."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    # where a waiting trainer is looked for by its module, the fake one shall be found, too
    monkeypatch.setattr(standbys, "COMMAND", [sys.executable, str(script), standbys.MODULE])
    return Model(base_path=tmp_path, engine="e", warm_seconds=600.0)


@pytest.fixture
def waiting(model: Model) -> Iterator[Standby]:
    """The one that waits."""
    wanted = wanted_of(model)
    assert wanted is not None
    made = Standby(wanted)
    yield made
    made.dismiss()


def run_directory(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def test_a_waiting_trainer_gives_the_result_of_a_cold_one(tiny_base: Path, tmp_path: Path) -> None:
    """Bit for bit: adapter, losses and verdicts; and it holds the run's lock while it works."""
    cold, warm = (make_run(tmp_path / name / "run", tiny_base, facts()) for name in ("cold", "warm"))
    wanted = wanted_of(Model(base_path=tiny_base, engine="e", warm_seconds=60.0, device="cpu"))
    assert wanted is not None
    trainer = Trainer(warm)
    trainer.start(standby=Standby(wanted))
    assert start(cold).wait(timeout=240) == EXIT_TRAINED
    wait(trainer.finished, 240)
    first, second = comparable(cold), comparable(warm)
    assert msgspec.json.encode(first) == msgspec.json.encode(second)
    weights = "adapter/adapter_model.safetensors"
    assert (warm / weights).read_bytes() == (cold / weights).read_bytes()
    assert trainer.finished().outcome == "trained"  # type: ignore[union-attr]


def comparable(directory: Path) -> RunReport:
    """A report without times and memory."""
    report = read_report(directory)
    assert report is not None
    return msgspec.structs.replace(report, seconds={}, tokens_per_second=0.0, peak_memory_bytes=0)


def test_the_lock_lives_as_long_as_the_trainer(waiting: Standby, tmp_path: Path) -> None:
    """A daemon that comes back finds it at work by the lock, and knows its process id."""
    directory, other = run_directory(tmp_path), take_lock(tmp_path / "gpu.lock")
    assert other is not None
    trainer = Trainer(directory)
    trainer.start(other, standby=waiting)
    os.close(other)
    wait((directory / "started").exists)
    wait(lambda: (directory / "started").read_text())
    assert (directory / "started").read_text() == f"{waiting.pid} 3"  # log, lock, the GPU's lock
    again = Trainer(directory)
    assert again.pid == trainer.pid == waiting.pid
    assert again.finished() is None
    assert take_lock(directory / "lock") is None and take_lock(tmp_path / "gpu.lock") is None
    (directory / "go").write_text("1")
    wait(trainer.finished)
    assert "my last words" in trainer.finished().reason  # type: ignore[union-attr]
    assert again.pid is None and again.finished() is not None


def test_one_that_was_killed_while_it_waited_is_replaced(waiting: Standby, tmp_path: Path) -> None:
    """`kill -9`: the run is begun by a cold trainer."""
    os.kill(waiting.pid, signal.SIGKILL)
    wait(lambda: not waiting.is_alive())
    directory = run_directory(tmp_path)
    trainer = Trainer(directory)
    trainer.start(standby=waiting)
    assert trainer.pid not in (None, waiting.pid)
    trainer.kill()


def test_one_that_is_killed_at_work_is_one_failed_run(waiting: Standby, tmp_path: Path) -> None:
    """Its end is told as that of any trainer."""
    directory = run_directory(tmp_path)
    trainer = Trainer(directory)
    trainer.start(standby=waiting)
    wait((directory / "started").exists)
    os.kill(waiting.pid, signal.SIGKILL)
    wait(trainer.finished)
    finished = trainer.finished()
    assert finished is not None and finished.outcome == "died" and "SIGKILL" in finished.reason


def test_one_that_is_told_to_stop_is_interrupted(waiting: Standby, tmp_path: Path) -> None:
    """SIGTERM reaches it as it reaches a cold one."""
    directory = run_directory(tmp_path)
    trainer = Trainer(directory)
    trainer.start(standby=waiting)
    wait((directory / "started").exists)
    time.sleep(0.05)  # its handler is in place
    trainer.stop(20)
    assert trainer.finished().outcome == "interrupted"  # type: ignore[union-attr]


def test_it_leaves_when_the_daemon_is_gone(waiting: Standby) -> None:
    """The socket's end without a run: nothing waits for ever."""
    waiting._channel.close()
    waiting._process.wait(20)
    assert waiting._process.returncode == 0


def test_only_what_is_wanted_waits(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One for each model, for its time, for its settings, while memory is there; taken once."""
    kept, models = Standbys(), {"npc": model}
    kept.prepare("npc", msgspec.structs.replace(model, warm_seconds=0.0))
    assert kept.take("npc", model) is None
    kept.prepare("npc", model)
    kept.prepare("npc", model)
    kept.look_after(models)
    found = kept.take("npc", model)
    assert found is not None and found.is_alive() and kept.take("npc", model) is None
    found.dismiss()

    for reason in ("late", "settings", "removed", "memory", "killed"):
        kept.prepare("npc", model)
        (standby,) = kept._waiting.values()
        with monkeypatch.context() as patch:
            now = dict(models)
            if reason == "late":
                patch.setattr(standby, "since", time.monotonic() - 601)
            elif reason == "settings":
                now["npc"] = msgspec.structs.replace(model, threads=2)
            elif reason == "removed":
                now.clear()
            elif reason == "memory":
                patch.setattr(standbys, "memory_share", lambda: 0.05)
            else:
                os.kill(standby.pid, signal.SIGKILL)
                wait(lambda standby=standby: not standby.is_alive())  # type: ignore[misc]
            kept.look_after(now)
        assert not standby.is_alive() and kept.take("npc", model) is None, reason
    kept.prepare("npc", model)
    changed = msgspec.structs.replace(model, base_path=tmp_path / "other")
    assert kept.take("npc", changed) is None  # dismissed: it has loaded another base
    kept.close()
    assert 0 < memory_share() < 1


# hands the run to the scripted trainer of `service_kit`
RELAY = """
import os, runpy, socket, sys
script, lab = sys.argv[1], os.path.dirname(sys.argv[1])
message, *_ = socket.recv_fds(socket.socket(fileno=os.dup(0)), 65536, 16)
if message:
    with open(lab + "/warm", "a") as log:
        log.write(os.path.basename(os.fsdecode(message)) + chr(10))
    sys.argv = [script, os.fsdecode(message)]
    runpy.run_path(script, run_name="__main__")
"""


def test_the_daemon_keeps_the_next_trainer_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first update starts cold; what is prepared after it trains the second; none is left when the daemon ends."""
    engine, lab = MemoryEngine(), tmp_path / "lab"
    monkeypatch.setattr(serving, "build", lambda *settings: engine)
    use_trainer(lab, monkeypatch)
    (tmp_path / "relay.py").write_text(RELAY)
    command = [sys.executable, str(tmp_path / "relay.py"), str(lab / "trainer.py"), standbys.MODULE]
    monkeypatch.setattr(standbys, "COMMAND", command)
    service = Service(make_config(tmp_path, warm_seconds=600.0), tmp_path / "eternad.toml")
    try:
        for update in (1, 2):
            drop(service, range(update * 100, update * 100 + 9))
            turn_until(service, lambda update=update: engine.table.get("npc") == f"npc@{update:04d}")  # type: ignore[misc]
            service.tick(time.time())
            (waiting,) = service.updates._standbys._waiting.values()
            assert waiting.is_alive()
        assert (lab / "trained").read_text().split() == ["npc-00001", "npc-00002"]
        assert (lab / "warm").read_text().split() == ["npc-00002"]
    finally:
        service.updates.stop()
        service.house.close()
    assert not waiting.is_alive()


def test_a_base_that_changed_meanwhile_is_loaded_anew(tiny_base: Path, tmp_path: Path) -> None:
    """What was loaded ahead is only taken while the files are the same."""
    from strategies import adapter, base_model
    from strategies.request import Lora, Wanted

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    base_model.load_ahead(Wanted(base_path=base, device="cpu", precision="float32"))
    ((key, (loaded, _)),) = base_model._ahead.items()
    os.utime(base / "model.safetensors")
    made = adapter.load_adapter(base, Lora(rank=4), precision="float32")
    assert made.model.get_base_model() is not loaded
    assert base_model._ahead.pop(key)[0] is loaded
    base_model.load_ahead(Wanted(base_path=base, device="cpu", precision="float32"))
    ((_, (loaded, _)),) = base_model._ahead.items()
    assert adapter.load_adapter(base, Lora(rank=4), precision="float32").model.get_base_model() is loaded
    assert not base_model._ahead
