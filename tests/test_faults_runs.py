"""Training that goes wrong, adapters that are not what they should be, engines that fail: seen by the whole service."""

import contextlib
import errno
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from faults_kit import Make, engine_fixture, fill, lab_fixture, make_fixture, small_disk_fixture, state_of
from service_kit import MemoryEngine, drop, report, turn_until
from test_train import facts, make_run

from buffers import claims, journal
from daemon import update
from daemon.service import Service
from daemon.state import runs
from strategies.request import EXIT_FAILED, EXIT_TRAINED, RunReport, read_report

fixtures = (engine_fixture, lab_fixture, make_fixture, small_disk_fixture)


def latest(service: Service) -> runs.Run:
    return runs.recent(service.house.database, "npc", 1)[0]


def learn(service: Service, numbers: range) -> None:
    """One update from drop to live."""
    before = len(runs.recent(service.house.database, "npc"))
    drop(service, numbers)
    turn_until(service, lambda: len(runs.recent(service.house.database, "npc")) > before)
    turn_until(service, lambda: state_of(service) == "LIVE")


def safetensors(array: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    """A file of one tensor (https://huggingface.co/docs/safetensors)."""
    header = json.dumps({"w": {"dtype": "F32", "shape": list(array.shape), "data_offsets": [0, array.nbytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + array.tobytes()


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


def pickled(trace: Path) -> bytes:
    import pickle

    return pickle.dumps(Bomb(trace))


def flip(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "nan", "pickle", "gone", "a link"])
def test_an_adapter_that_is_not_the_published_one_never_serves(
    make: Make, engine: MemoryEngine, tmp_path: Path, damage: str
) -> None:
    """Whatever takes the file's place after the gate: the run fails, the live version serves on, nothing is opened."""
    service = make()
    learn(service, range(10))
    engine.fault = "unavailable"
    drop(service, range(10, 20))
    turn_until(service, lambda: state_of(service) == "PUBLISHED")
    weights, trace = service.serving.directory("npc", 2) / "adapter_model.safetensors", tmp_path / "opened"
    data = weights.read_bytes()
    weights.unlink()
    if damage == "a link":
        weights.symlink_to("/etc/hostname")
    elif damage != "gone":
        weights.write_bytes({
            "truncated": data[:-1], "flipped": flip(data), "nan": safetensors(np.full((4, 4), np.nan, np.float32)),
            "pickle": pickled(trace),
        }[damage])  # fmt: skip
    engine.fault = ""
    turn_until(service, lambda: state_of(service) == "FAILED")
    assert "adapter_model.safetensors" in latest(service).reason
    assert engine.table == {"npc": "npc@0001"} and set(engine.adapters) == {"npc@0001"}
    assert not trace.exists()


@pytest.mark.parametrize(
    ("code", "is_held_against"),
    [
        ("oom", False), ("disk_full", False), ("base_missing", False), ("non_finite_loss", True),
        ("nothing_to_learn", True),
    ],
)  # fmt: skip
def test_a_trainer_that_gives_up_is_a_failure_with_its_code(
    make: Make, lab: Path, engine: MemoryEngine, code: str, is_held_against: bool
) -> None:
    """FAILED, never a success; what is wrong with the machine is not held against the examples."""
    (lab / "orders").write_text("fail")
    gave_up = RunReport(run_id="scripted", status="failed", code=code, reason="at step 3")
    (lab / "failed.json").write_bytes(msgspec.json.encode(gave_up))
    service = make(changes={"run_attempts_max": 1})
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "FAILED")
    assert latest(service).reason.startswith(f"{code}: ")
    state = "rejected" if is_held_against else "pending"
    assert journal.counts(service.house.database, "npc") == {f"train/{state}": 9, f"heldout/{state}": 1}
    assert engine.history in ([], ["base"])


DEAF = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
(Path(sys.argv[1]) / f"pid.{os.getpid()}").touch()
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_hung_trainer_is_ended_with_all_its_children(make: Make, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress: SIGTERM, then SIGKILL to its whole group, another attempt, then FAILED `hang`; the data waits."""
    (lab / "deaf.py").write_text(DEAF)
    monkeypatch.setattr(update, "COMMAND", [sys.executable, str(lab / "deaf.py")])
    monkeypatch.setattr("daemon.service.updates.HUNG_STOP_SECONDS", 0.2)
    service = make(changes={"hang_seconds": 2.0, "run_attempts_max": 2})
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "FAILED", 60)
    assert latest(service).reason.startswith("hang: ")
    assert claims.pending(service.house.database, "npc").train == 9
    pids = [int(path.suffix[1:]) for path in service.updates.directory(latest(service)).glob("pid.*")]
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) >= 3 and not [pid for pid in pids if is_alive(pid)]


@pytest.mark.parametrize("missing", ["evaluation", "canaries", "report"])
def test_what_the_gate_cannot_judge_is_never_promoted(
    make: Make, lab: Path, engine: MemoryEngine, missing: str
) -> None:
    """No evaluation, no proof to come, no report that can be read: no version serves, and the data waits."""
    whole = report(1.0)
    if missing == "report":
        (lab / "good.json").write_bytes(b'{"run_id": "scripted", "status": "trai')
    else:
        empty = {"evaluation": None, "canaries": []}[missing]
        (lab / "good.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(whole, **{missing: empty})))
    service = make(changes={"run_attempts_max": 1})
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) in ("REJECTED", "FAILED"))
    assert runs.live_version(service.house.database, "npc") is None
    assert engine.table in ({}, {"npc": "base"})


def test_a_trainer_that_finds_no_room_blames_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`disk_full` in its report, so that its examples are not marked."""
    from strategies import train
    from strategies.pulse import Pulse

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint")

    monkeypatch.setattr(train, "read_request", full)
    assert train.attempt(tmp_path, Pulse(tmp_path)).code == "disk_full"


def test_a_reload_that_fails_changes_nothing_for_a_run_at_work(make: Make, lab: Path, tmp_path: Path) -> None:
    """A broken file: the old configuration stays, a counter says so, and the run goes live."""
    (lab / "orders").write_text("")
    service = make()
    drop(service, range(10))
    turn_until(service, lambda: state_of(service) == "TRAINING")
    before = service.house.config
    (tmp_path / "eternad.toml").write_text("tick_seconds = [")
    from daemon.config import ConfigError

    with pytest.raises(ConfigError):
        service.reload()
    assert service.house.config is before
    assert service.snapshot()["counters"]["reload_failures"] == 1
    turn_until(service, lambda: state_of(service) == "LIVE")


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(small_disk: Path) -> None:
    """The run can still go on from there when there is room again."""
    import torch

    from strategies import checkpoint

    checkpoint.write_checkpoint(small_disk, 1, {"flat": torch.ones(1000)}, {"step": 1}, "ab" * 32)
    filler = fill(small_disk, left=20_000)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_checkpoint(small_disk, 2, {"flat": torch.ones(100_000)}, {"step": 2}, "ab" * 32)
    found = checkpoint.read_checkpoint(small_disk, "ab" * 32)
    assert found is not None and found[1] == {"step": 1}
    filler.unlink()
    checkpoint.write_checkpoint(small_disk, 2, {"flat": torch.ones(100_000)}, {"step": 2}, "ab" * 32)
    found = checkpoint.read_checkpoint(small_disk, "ab" * 32)
    assert found is not None and found[1] == {"step": 2}


def test_a_real_update_on_a_full_disk_fails_and_succeeds_with_room(tiny_base: Path, small_disk: Path) -> None:
    """A trainer that cannot save leaves no report of success, and the same run can be done again."""
    from strategies import train

    directory = make_run(small_disk / "run", tiny_base, facts())
    filler = fill(small_disk, left=24_000)
    with contextlib.suppress(OSError):  # not even the report has room: the daemon calls that `died`
        assert train.main(directory) == EXIT_FAILED
    left = read_report(directory)
    assert left is None or (left.status, left.code) == ("failed", "disk_full")
    filler.unlink()
    update.clear(directory)
    assert train.main(directory) == EXIT_TRAINED
