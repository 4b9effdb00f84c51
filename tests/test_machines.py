"""torchrun over several machines: refused in one sentence, found by those who join, and, slowly, one adapter of two."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_parallel import TOLERANCE, difference, request
from test_train import ROOT, finished, wait_for_step

from daemon import update
from strategies import train
from strategies.machines import MEETING, Meeting, agent, knock, main, meetings
from strategies.parallel.choice import BackendName, Parallel, refusal
from strategies.request import EXIT_TRAINED, write


def two(meet_at: str = "10.0.0.1:29400", **fields: object) -> Parallel:
    """Two machines with one process each."""
    return Parallel(executor="torchrun", processes=2, machines=2, meet_at=meet_at, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parallel", "says"),
    [
        (Parallel(executor="horovod", processes=2, machines=2), "is for executor = 'torchrun'"),
        (Parallel(executor="torchrun", processes=3, machines=2, meet_at="a:1"), "cannot be shared by 2 machines"),
        (Parallel(executor="torchrun", processes=2, machines=2), "must say where 2 machines meet; take 'HOST:PORT'"),
        (two("10.0.0.1"), "take 'HOST:PORT'"),
        (two("a:1,is_host=1:2"), "take 'HOST:PORT'"),
    ],
)
def test_machines_that_cannot_meet_are_refused(parallel: Parallel, says: str) -> None:
    """Before any work, with what to write instead."""
    reason = refusal(parallel, "cpu", gpu=False)
    assert says in reason and "take" in reason and "\n" not in reason
    assert refusal(two(), "cpu", gpu=False) == ""


def test_each_machine_starts_its_share_of_the_processes(tmp_path: Path) -> None:
    """One opens the meeting place, the others only come there; the run's id keeps runs apart."""
    parallel = Parallel(executor="torchrun", processes=8, machines=2, meet_at="10.0.0.1:29400", timeout_seconds=60.0)
    meeting = Meeting(run_id="r7", parallel=parallel)
    leading = agent(meeting, tmp_path, "10.0.0.1", leads=True)
    joining = agent(meeting, tmp_path, "10.0.0.2", leads=False)
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-id=r7", "--rdzv-endpoint=10.0.0.1:29400"} <= set(leading)
    assert "--rdzv-conf=is_host=true,join_timeout=60" in leading and "--local-addr=10.0.0.2" in joining
    assert set(leading) ^ set(joining) == {
        "--rdzv-conf=is_host=true,join_timeout=60", "--rdzv-conf=is_host=false,join_timeout=60",
        "--local-addr=10.0.0.1", "--local-addr=10.0.0.2",
    }  # fmt: skip


def test_of_runs_at_one_address_the_newest_is_joined(tmp_path: Path) -> None:
    """A leader that was killed leaves its file; what is torn or gone is passed over."""
    for age, (name, place) in enumerate([("c", "b:2"), ("b", "a:1"), ("old", "a:1")]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write(tmp_path / "runs" / name / MEETING, Meeting(run_id=name, parallel=two(place)))
        os.utime(tmp_path / "runs" / name / MEETING, (time.time(), time.time() - 100 * age))
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / MEETING).write_text("{")
    assert sorted(directory.name for directory, _ in meetings(tmp_path)) == ["b", "c"]


def test_an_own_address_is_the_one_by_which_the_leader_is_reached() -> None:
    """Nobody has to configure it; where nobody listens there is none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert knock(f"127.0.0.1:{port}") == "127.0.0.1"
    assert knock(f"127.0.0.1:{port}") == ""


def test_a_wrong_call_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    """And does nothing."""
    assert main([]) == 2 and main(["--join", "a", "b"]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.fixture
def joining(tmp_path: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """The other machine: a process of its own that joins what it finds in the state directory."""
    command = [sys.executable, "-m", "strategies.machines", "--join", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "joining.log").open("wb") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    yield child
    if child.poll() is None:
        child.terminate()
        assert child.wait(60) == 0, (tmp_path / "joining.log").read_text()


def place() -> str:
    """A free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def ended(run_directory: Path, seconds: float = 240.0) -> update.Finished:
    """The run as the daemon starts and watches it."""
    trainer = update.Trainer(run_directory)
    trainer.start()
    deadline = time.monotonic() + seconds
    while (found := trainer.finished()) is None:
        assert time.monotonic() < deadline, (run_directory / "train.log").read_text()
        time.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "deepspeed-3", "fabric-ddp"])
def test_two_machines_make_the_adapter_of_one_process(
    joining: "subprocess.Popen[bytes]", tiny_base: Path, tmp_path: Path, backend: BackendName,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """EWC on two torchruns that know nothing of each other but the meeting place; nothing is left to join."""
    monkeypatch.chdir(ROOT)
    assert train.main(request(tiny_base, tmp_path / "alone", "ewc")) == EXIT_TRAINED
    run = request(tiny_base, tmp_path / "runs" / "r1", "ewc", parallel=two(place(), backend=backend))
    assert ended(run).outcome == "trained", (run / "train.log").read_text()
    report = finished(run)
    assert (report.backend, report.processes) == (backend, 2)
    assert difference(tmp_path / "alone", run) < TOLERANCE
    assert not list(meetings(tmp_path))


@pytest.mark.slow
def test_a_lost_machine_ends_the_run_and_one_that_never_comes_fails_it(
    joining: "subprocess.Popen[bytes]", tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to the whole other machine: no report, the checkpoint may serve; without it a reason in one sentence."""
    monkeypatch.chdir(ROOT)
    parallel = two(place(), timeout_seconds=20.0)
    run = request(tiny_base, tmp_path / "runs" / "r1", "naive", parallel=parallel, training={"epochs": 5000})
    trainer = update.Trainer(run)
    trainer.start()
    wait_for_step(run, 3, 240)
    os.killpg(joining.pid, signal.SIGKILL)
    joining.wait()
    deadline = time.monotonic() + 120
    while (found := trainer.finished()) is None:
        assert time.monotonic() < deadline, (run / "train.log").read_text()
        time.sleep(0.2)
    assert found.outcome == "died" and "another process of this run is gone" in found.reason
    again = ended(run)
    assert (again.outcome, again.code) == ("failed", "cluster_lost")
    assert f"no 2 machines met at {parallel.meet_at} within 20 s" in again.reason


@pytest.mark.slow
def test_told_to_stop_on_either_machine_all_leave_with_a_checkpoint(
    joining: "subprocess.Popen[bytes]", tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM to who leads is an interruption; to who joins an end that the daemon tries again. Both go on from it."""
    monkeypatch.chdir(ROOT)
    run = request(tiny_base, tmp_path / "runs" / "r1", "ewc", parallel=two(place()), training={"epochs": 5000})
    trainer = update.Trainer(run)
    trainer.start()
    wait_for_step(run, 3, 240)
    trainer.stop(60)
    left = trainer.finished()
    assert left is not None and left.outcome == "interrupted", (run / "train.log").read_text()
    first = step_of(run)
    again = update.Trainer(run)
    again.start()
    wait_for_step(run, first + 3, 240)
    joining.terminate()
    assert joining.wait(60) == 0
    deadline = time.monotonic() + 120
    while (left := again.finished()) is None:
        assert time.monotonic() < deadline, (run / "train.log").read_text()
        time.sleep(0.2)
    assert left.outcome == "died" and step_of(run) > first


def step_of(run_directory: Path) -> int:
    """Where the checkpoint stands."""
    name: str = json.loads((run_directory / "checkpoint.json").read_bytes())["file"]
    return int(name.removeprefix("checkpoint-").removesuffix(".safetensors"))
