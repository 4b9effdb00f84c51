"""What tests of the service share: an engine in memory, a trainer of a few lines, a daemon without watching."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from buffers import journal
from buffers.example import Example, Origin
from daemon import update
from daemon.config import Config, Engine, Gate, Model, Schedule, Watch
from daemon.engines.contract import (
    Capabilities,
    EngineRefused,
    EngineUnavailable,
    Fingerprint,
    Handle,
    Health,
    Loaded,
    Routed,
    Version,
)
from daemon.service import Service
from daemon.state.database import transaction
from strategies.request import Canary, Evaluation, Measure, RunReport, Shift

CANARY = Canary(
    prompt="Who are you?", prompt_token_ids=[1, 2], token_ids=[3, 4], logprobs=[-0.1, -0.2],
    base_logprobs=[-3.0, -4.0],
)  # fmt: skip


class MemoryEngine:
    """An engine of the contract, in memory. `fault` makes it fail: unavailable, refuses, lies."""

    def __init__(self) -> None:
        self.fault = ""
        self.epoch = 1
        self.adapters: dict[str, str] = {}
        self.table: dict[str, str] = {}
        self.history: list[str] = []
        self.hang = threading.Event()
        self.hang.set()

    def restart(self) -> None:
        """It comes back with the base alone."""
        self.epoch += 1
        self.adapters, self.table = {}, {}

    def _check(self) -> None:
        self.hang.wait(30)
        if self.fault == "unavailable":
            raise EngineUnavailable("connection refused")

    def capabilities(self) -> Capabilities:
        return Capabilities(base="base", slots=3, moves_aliases=True)

    def load(self, version: Version) -> Handle:
        self._check()
        if self.fault == "refuses":
            raise EngineRefused("rank 64 is above --max-lora-rank 16")
        self.adapters[version.name] = str(version.path)
        return Handle(name=version.name)

    def loaded(self) -> list[Loaded]:
        self._check()
        return [Loaded(name=name, root=root) for name, root in self.adapters.items()]

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:
        self._check()
        name = self.table.get(name, name)
        lies = self.fault == "lies" or name == "base"
        return Fingerprint(
            served_by=name, logprobs=[list(c.base_logprobs if lies else c.logprobs) for c in canaries]
        )  # fmt: skip

    def aliases(self) -> dict[str, str]:
        self._check()
        return dict(self.table)

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        self._check()
        if self.table.get(alias) != expected:
            raise EngineUnavailable("somebody else moved the alias")
        self.table[alias] = target
        self.history.append(target)
        return Routed(previous=expected)

    def unload(self, name: str) -> None:
        self.adapters.pop(name, None)

    def health(self) -> Health:
        return Health(ok=self.fault != "unavailable", epoch=str(self.epoch), reason=self.fault)


# writes what a real trainer writes; `orders` (beside the state directory) says how the next runs go
TRAINER = """
import os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])
lab = Path({lab!r})
with (lab / "trained").open("a") as log:
    log.write(run.name + "\\n")
orders = (lab / "orders").read_text().split() if (lab / "orders").exists() else []
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
if "slow" in orders:
    time.sleep(60)
if "crash" in orders:
    os.kill(os.getpid(), signal.SIGKILL)
(run / "adapter").mkdir(exist_ok=True)
(run / "adapter" / "adapter_config.json").write_text("{{}}")
(run / "adapter" / "adapter_model.safetensors").write_bytes(run.name.encode() * 100)
name = "bad.json" if "bad" in orders else "failed.json" if "fail" in orders else "good.json"
(run / ".report.tmp").write_bytes((lab / name).read_bytes())
os.replace(run / ".report.tmp", run / "report.json")
sys.exit(1 if "fail" in orders else 0)
"""


def measure(mean: float) -> Measure:
    return Measure(mean=mean, low=mean, high=mean, examples=10)


def report(after: float) -> RunReport:
    shift = Shift(base=measure(3.0), before=measure(3.0), after=measure(after), change=measure(after - 3.0))
    return RunReport(
        run_id="scripted", status="trained", evaluation=Evaluation(new=shift, drift_base=measure(0.1)),
        canaries=[CANARY], base_sha256="b",
    )  # fmt: skip


def prepare_lab(lab: Path) -> list[str]:
    """Write the scripted trainer and its reports; returns the command that takes the place of the real one."""
    lab.mkdir(exist_ok=True)
    (lab / "trainer.py").write_text(TRAINER.format(lab=str(lab)))
    (lab / "good.json").write_bytes(msgspec.json.encode(report(1.0)))
    (lab / "bad.json").write_bytes(msgspec.json.encode(report(3.5)))
    failed = RunReport(run_id="scripted", status="failed", code="non_finite_loss", reason="loss is NaN at step 3")
    (lab / "failed.json").write_bytes(msgspec.json.encode(failed))
    return [sys.executable, str(lab / "trainer.py")]


def make_config(directory: Path, **model: Any) -> Config:
    base = directory / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    settings: dict[str, Any] = {
        "base_path": base, "engine": "local", "schedule": Schedule(threshold_examples=5, quiet_seconds=0.0),
        "gate": Gate(),
    }  # fmt: skip
    return Config(
        library_directory=directory / "library", state_directory=directory / "state",
        models={"npc": Model(**settings | model)}, engines={"local": Engine(urls=["http://127.0.0.1:1"])},
        watch=Watch(stability_seconds=0.0, scan_seconds=0.2), tick_seconds=0.02, disk_free_bytes_min=0.0,
    )  # fmt: skip


def drop(service: Service, numbers: range, model: str = "npc", answer: str = "a") -> None:
    """Examples as an ingested file leaves them."""
    items = [
        (Example(shape="demonstration", prompt=f"q{n}", completion=f"{answer}{n}"), Origin(file="f.jsonl", line=n))
        for n in numbers
    ]
    with transaction(service.house.database) as connection:
        journal.add(connection, model, items, heldout_fraction=0.1, now=time.time())


def turn_until(service: Service, condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Let the daemon's loop turn until something has happened."""
    deadline = time.monotonic() + seconds
    while not condition():
        service.tick(time.time())
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def use_trainer(lab: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(update, "COMMAND", prepare_lab(lab))
