"""What tests of the operator's side share: a configuration, a state with a past, and a daemon that only answers."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buffers import claims, journal
from buffers.example import Example, Origin
from buffers.experience import Cut
from daemon import cli, control, gate, publish
from daemon.config import Gate
from daemon.control import Command
from daemon.state import quarantine, runs
from daemon.state.database import Connection, open_database, transaction
from daemon.state.quarantine import Refusal
from strategies.request import Canary, Evaluation, Measure, Progress, RunReport, SequenceMetrics, Shift, write

CONFIG = """
library_directory = "library"
state_directory = "state"
{extra}
[engines.local]
urls = ["http://127.0.0.1:9"]

[models.npc]
base_path = "base"
engine = "local"
[[models.npc.strategy]]
name = "replay"

[models.book]
base_path = "base"
engine = "local"
"""


def make_config(directory: Path, extra: str = "") -> Path:
    """`eternad.toml` beside a base model that holds nothing but its name."""
    (directory / "base").mkdir(exist_ok=True)
    (directory / "base" / "config.json").write_text("{}")
    path = directory / "eternad.toml"
    path.write_text(CONFIG.format(extra=extra))
    return path


def make_state(directory: Path) -> Path:
    """Two updates of `npc` in the past, a rejected one, one in training, and a quarantined line; returns STATE."""
    state = directory / "state"
    connection = open_database(state / "eternad.db")
    for number, loss in enumerate((1.0, 0.8), start=1):
        learn(connection, state, number, loss)
    learn(connection, state, 3, 4.0)
    with transaction(connection):
        add(connection, range(300, 310))
        run = runs.create(connection, "npc", "threshold", 2, 100)
        assert run is not None
        runs.move(connection, run, "TRAINING", pid=1)
        add(connection, range(400, 403))
        quarantine.add(
            connection,
            Refusal(path="content/npc/b.txt", line=3, code="not_utf8", stage="read", message="byte 7 is \x1b[31m"),
            time.time(), excerpt=b"\x1b[31mred",
        )  # fmt: skip
    directory_of_run = state / "runs" / run.id
    directory_of_run.mkdir(parents=True)
    write(directory_of_run / "progress.json", progress())
    connection.close()
    return state


def progress() -> Progress:
    return Progress(
        phase="train", step=45, steps=100, loss=1.25, tokens_per_second=312.0, eta_seconds=12.0, at=time.time()
    )


def add(connection: Connection, numbers: range, model: str = "npc") -> None:
    items = [
        (Example(shape="demonstration", prompt=f"q{n}", completion=f"a{n}"), Origin(file="content/npc/a.jsonl", line=n))
        for n in numbers
    ]
    journal.add(connection, model, items, heldout_fraction=0.1)


def measure(mean: float) -> Measure:
    return Measure(mean=mean, low=mean - 0.1, high=mean + 0.1, examples=10)


def report_of(run_id: str, after: float) -> RunReport:
    shift = Shift(base=measure(3.0), before=measure(2.5), after=measure(after), change=measure(after - 2.5))
    canary = Canary(
        prompt="Who are you?",
        prompt_token_ids=[1],
        token_ids=[2, 3],
        logprobs=[-0.1, -0.2],
        base_logprobs=[-3.0, -4.0],
        text=f"I am <b>{after}</b>\x1b[31m",
    )
    sequence = SequenceMetrics(acc=measure(-after), bwt=measure(-0.1))
    return RunReport(
        run_id=run_id, status="trained", examples={"new": 9, "replay": 4}, steps=10, epochs=2.0, tokens=5000,
        seconds={"train": 12.0, "total": 20.0}, tokens_per_second=400.0, losses=[(1, 3.0), (5, 2.0), (10, after)],
        evaluation=Evaluation(new=shift, old={"1": shift}, sequence=sequence, drift_base=measure(0.3)),
        canaries=[canary],
        strategies={"replay": {"replayed": 4.0}}, peak_memory_bytes=1 << 30, base_sha256="b" * 64,
    )  # fmt: skip


def learn(connection: Connection, state: Path, number: int, after: float) -> None:
    """One whole update that ends in a version, or in a rejection when it made things worse."""
    with transaction(connection):
        add(connection, range(number * 10, number * 10 + 10))
        live = runs.live_version(connection, "npc")
        run = runs.create(connection, "npc", "threshold", None if live is None else live.number, 100)
        assert run is not None
        report = report_of(run.id, after)
        verdict = gate.judge(report, Gate())
        for to in ("TRAINING", "TRAINED", "EVALUATING"):
            run = runs.move(connection, run, to)
        directory = state / "runs" / run.id
        directory.mkdir(parents=True)
        write(directory / "report.json", report)
        if verdict.outcome != "accepted":
            runs.move(connection, run, "REJECTED", verdict.reason, verdict=msgspec.to_builtins(verdict))
            claims.release(connection, run.id, attempts_max=1)
            return
        cut = Cut(sha256="e", rows={"new": 9, "replay": 4}, replay_wanted=4, replay_ratio=0.3)
        runs.annotate(connection, run, cut)
        run = runs.move(connection, run, "ACCEPTED", verdict.reason, verdict=msgspec.to_builtins(verdict))
        (directory / "adapter").mkdir()
        (directory / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        manifest = publish.manifest_of(
            report, model="npc", number=number, parent=run.parent_version, run_id=run.id, update_number=number,
            experience_sha256="e",
        )  # fmt: skip
        digest = publish.publish(directory, publish.directory_of(state / "versions", "npc", number), manifest)
        runs.publish(connection, run, number, digest)
        run = runs.move(connection, run, "PUBLISHED", run.reason, version=number)
        claims.consume(connection, run.id, run.update_number)
        runs.move(connection, run, "LIVE", run.reason)
        runs.serve(connection, "npc", number, activation={"flip_ms": 0.1, "total_ms": 40.0})


def snapshot() -> dict[str, Any]:
    return {
        "pid": 4711, "started_at": time.time() - 60, "counters": {"overflow": 1, "files": 7},
        "engines": {"npc": {"state": "ok", "serving": 2, "detail": "serves npc@0002"}},
    }  # fmt: skip


def obey(command: Command) -> None:
    """What a daemon would say."""
    order = command.order
    if order.action == "cancel":
        command.answer(f"no run {order.run_id}; see: eternad history", ok=False)
    elif order.action == "update":
        command.answer("run npc-00003 started", run="npc-00003")
    else:
        command.answer(f"{order.action} {order.model} {order.version} {order.quarantine_id} by {command.actor}")


@contextmanager
def answering(state: Path, carry_out: Callable[[Command], None] = obey) -> Iterator[control.Handle]:
    """A control socket in `state` whose commands are carried out by a thread."""
    state.mkdir(exist_ok=True)
    commands: control.Commands = queue.Queue()
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            try:
                carry_out(commands.get(timeout=0.05))
            except queue.Empty:
                continue

    thread = threading.Thread(target=loop)
    thread.start()
    handle = control.serve(state / "control.sock", commands, snapshot)
    try:
        yield handle
    finally:
        handle.close()
        stop.set()
        thread.join()


@pytest.fixture(name="config")
def config_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that is found by itself, because commands run in its directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ETERNAD_CONFIG", raising=False)
    return make_config(tmp_path)


@pytest.fixture(name="state")
def state_fixture(config: Path) -> Path:
    """A state directory with a past."""
    return make_state(config.parent)


@pytest.fixture(name="eternad")
def eternad_fixture(config: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command and gives its output; fails unless the exit code is the expected one."""

    def call(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        returned = cli.main(arguments)
        said = capsys.readouterr()
        assert returned == code, said
        assert "Traceback" not in said.err
        return said.out if code == 0 else said.err

    return call
