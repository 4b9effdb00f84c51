"""`make bench`: our training step, strategies, fixed costs and swaps, measured against the peers.

`python -m bench.speed [--quick] [--minutes 13] [--json FILE] [--parts trainers,update,...]`

What the time does not suffice for is left out and named; the first parts are the most important ones. Every trainer
runs in a child process of its own, in turn (A B C A B C), on the same documents, adapter and optimiser, on one thread;
medians and ratios go between the markers of `docs/performance.md`, a picture beside it. TRL and its libraries live in
`.venv-bench`, which is made on first use and borrows everything else from `.venv`.
"""

import argparse
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.peers.documents import batches
from bench.peers.work import Result, Work
from bench.speed_report import Findings, Overhead, write_page

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-bench"
LOCK = ROOT / "requirements-bench.lock"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip


class Trainer(NamedTuple):
    """One contestant."""

    title: str
    module: str
    variant: str
    steps: int
    """The slow ones do fewer; all batches have the same lengths."""


OURS = "eternad"
TRAINERS = (
    Trainer(OURS, "ours", "", 4),
    Trainer("TRL, padding-free, bf16", "trainers", "trl-padding-free", 2),
    Trainer("TRL, packing bfd, bf16", "trainers", "trl-packing", 2),
    Trainer("TRL SFTTrainer, defaults", "trainers", "trl", 2),
    Trainer("HF Trainer + PEFT, defaults", "trainers", "hf", 2),
    Trainer("Avalanche Naive + PEFT", "avalanche_naive", "", 2),
)
STRATEGIES = ("ewc", "replay", "distill", "agem", "gem")
SHIPPED = ("ewc", "agem", "gem")
"""Avalanche has plugins for these."""
PARTS = ("trainers", "update", "service", "swap", "strategies", "shipped", "again")
CHILD_SECONDS = 600.0
EXPECTED_SECONDS = {"gemm": 15.0, "overhead": 45.0, "avalanche_plugins": 50.0, "update": 70.0, "service": 110.0}
"""Of a child that has not run yet: with less time than that left it is not begun. Others: 70."""
AGAIN_SECONDS = 40.0
"""Trainers that take longer are measured once: the fast ones decide the ratio that matters."""


def make_peers_environment() -> Path:
    """Python of `.venv-bench`, made when it is missing or its lock file has changed."""
    python, stamp = PEERS / "bin" / "python", PEERS / "installed"
    if stamp.exists() and stamp.read_text("utf-8") == LOCK.read_text("utf-8"):
        return python
    say("making .venv-bench")
    venv.create(PEERS, with_pip=False, clear=True)
    libraries = PEERS / "lib" / f"python{platform.python_version().rpartition('.')[0]}" / "site-packages"
    (libraries / "main.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(libraries)]
    subprocess.run([*pip, "-r", str(LOCK)], check=True)
    stamp.write_text(LOCK.read_text("utf-8"), "utf-8")
    return python


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run_child(python: Path, module: str, work: Work, variant: str = "", seconds: float = CHILD_SECONDS) -> bytes | None:
    """The result of one child, or None where it failed or took longer than `seconds`: its last lines are said."""
    with tempfile.TemporaryDirectory() as directory:
        given, result = Path(directory) / "work.json", Path(directory) / "result.json"
        given.write_bytes(msgspec.json.encode(work))
        command = [str(python), "-m", f"bench.peers.{module}", str(given), str(result), variant]
        environment = {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            said = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            say(f"{module} {variant} took longer than {seconds:.0f} s")
            process.terminate()  # it ends its own children first
            process.communicate()
            return None
        if process.returncode == 0 and result.exists():
            return result.read_bytes()
        say(f"{module} {variant} failed ({process.returncode}): " + " | ".join(said.splitlines()[-4:]))
        return None


class Bench:
    """One run of the bench."""

    def __init__(self, base: Path, general: Path, rounds: int, quick: bool, copy: Path | None, minutes: float) -> None:
        self.rounds, self.quick, self.copy = rounds, quick, copy
        self.deadline = time.monotonic() + 60 * minutes
        self.taken: dict[str, float] = {}
        """Seconds that each child took the last time."""
        self.python = Path(sys.executable)
        self.work = Work(
            base=str(base), batches=batches(base, general, 4), texts=[str(general)], rounds=1 if quick else 2
        )
        self.findings = Findings(
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), processor=processor(), load=list(os.getloadavg()),
            versions=versions(), rounds=rounds, base=base.name,
        )  # fmt: skip

    def go_on(self, earlier: Findings) -> None:
        """Add to what calls before have measured; the page says when the first began, and the load then."""
        self.findings = earlier

    def child(self, module: str, work: Work, variant: str = "", python: Path | None = None) -> bytes | None:
        """A child's result, if there is time for it; else None, and the page says what is missing."""
        name = f"{module} {variant}".strip()
        left = self.deadline - time.monotonic()
        if left < self.taken.get(name, EXPECTED_SECONDS.get(module, 70.0)):
            say(f"no time for {name}")
            return self._missing(name)
        began = time.monotonic()
        found = run_child(python or self.python, module, work, variant, min(left, CHILD_SECONDS))
        self.taken[name] = time.monotonic() - began
        if found is not None and name in self.findings.skipped:
            self.findings.skipped.remove(name)  # of an earlier call
        return found if found is not None else self._missing(name)

    def _missing(self, name: str) -> None:
        # what was measured in an earlier round is only measured less often
        if name not in self.taken and name not in self.findings.skipped:
            self.findings.skipped.append(name)

    def trainers(self) -> None:
        """Everybody in turn; a peer that cannot be made to run stands with its reason on stderr and without figures."""
        self._round(TRAINERS)

    def again(self) -> None:
        """Further rounds, as many as there is time for: of those that decide the ratios."""
        fast = [
            trainer
            for trainer in TRAINERS
            if self.taken.get(f"{trainer.module} {trainer.variant}".strip(), 999.0) <= AGAIN_SECONDS
        ]
        for _ in range(self.rounds - 1):
            self._round(fast)

    def _round(self, trainers: Sequence[Trainer]) -> None:
        peers = make_peers_environment()
        found = self.child("gemm", self.work)
        if found is not None:
            self.findings.gemm.append(msgspec.json.decode(found, type=dict[str, float]))
        for trainer in trainers:
            self._train(peers, trainer)

    def _train(self, python: Path, trainer: Trainer) -> None:
        steps = min(trainer.steps, 2) if self.quick else trainer.steps
        work = msgspec.structs.replace(self.work, steps=steps)
        found = self.child(trainer.module, work, trainer.variant, python)
        if found is None:
            return
        result = msgspec.json.decode(found, type=Result)
        self.findings.trainers.setdefault(trainer.title, []).append(result)
        self.keep()
        rate = f"{result.tokens_per_cpu_second:.1f} tokens per CPU second, {result.peak_bytes / 1e9:.2f} GB"
        say(f"{trainer.title}: {rate}, losses {[round(loss, 3) for loss in result.losses[:2]]}")

    def keep(self) -> None:
        """Write what was found so far to the copy that was asked for."""
        if self.copy:
            self.copy.write_bytes(msgspec.json.encode(self.findings))

    def strategies(self) -> None:
        """Each beside naive training in one process."""
        smaller = [batch[:4] for batch in self.work.batches]
        work = msgspec.structs.replace(self.work, batches=smaller, steps=2)
        for name in STRATEGIES:
            self._overhead("overhead", work, name, self.findings.strategies)

    def shipped(self) -> None:
        """Avalanche's own plugins beside Avalanche's `Naive`; their solvers live with the peers."""
        self.python, ours = make_peers_environment(), self.python
        for name in SHIPPED:
            self._overhead("avalanche_plugins", self.work, name, self.findings.shipped)
        self.python = ours

    def _overhead(self, module: str, work: Work, name: str, into: dict[str, Overhead]) -> None:
        found = self.child(module, work, name)
        if found is not None:
            into[name] = msgspec.json.decode(found, type=Overhead)
            self.keep()
            say(f"{module} {name}: {into[name].failure or f'{into[name].ratio:.3f} x naive'}")

    def update(self) -> None:
        """A whole update of 64 examples; imports and installation."""
        self._numbers("update")

    def service(self) -> None:
        """Intake, status, idling, from a drop to its answer: with daemon and engine as processes."""
        self._numbers("service")

    def swap(self) -> None:
        """The embedded engine takes over a new adapter."""
        self._numbers("swap")

    def _numbers(self, module: str) -> None:
        found = self.child(module, self.work)
        if found is not None:
            self.findings.numbers |= msgspec.json.decode(found, type=dict[str, float])
            say(", ".join(f"{name} {value:.3g}" for name, value in self.findings.numbers.items()))


def processor() -> str:
    """The CPU's model and how many of its cores we may use."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    """Of the libraries that decide the figures."""
    from importlib.metadata import version

    peers = [line.partition("==") for line in LOCK.read_text("utf-8").splitlines() if "==" in line]
    ours = {name: version(name) for name in ("torch", "transformers", "peft", "avalanche-lib")}
    return ours | {name: number for name, _, number in peers if name == "trl"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench.speed", description="Speed against the peers.")
    made.add_argument("--base", type=Path, default=ROOT / ".cache" / "base" / "smollm2-135m")
    made.add_argument("--general", type=Path, default=ROOT / "examples" / "biblioteca" / "general")
    made.add_argument("--rounds", type=int, default=3, help="at most; the slow peers run once")
    made.add_argument("--minutes", type=float, default=13.0, help="what does not fit is left out")
    made.add_argument("--parts", default=",".join(PARTS), help="which parts to run")
    made.add_argument("--json", type=Path, help="also write everything that was measured there")
    made.add_argument("--add", action="store_true", help="to what --json's file has of calls before: rounds and parts")
    made.add_argument("--docs", type=Path, default=ROOT / "docs")
    made.add_argument("--quick", action="store_true", help="one round: a smoke, not a measurement; no page is written")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's text."""
    given = parser().parse_args(arguments)
    unknown = [name for name in given.parts.split(",") if name not in PARTS]
    if unknown:
        parser().error(f"--parts: there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    rounds = 1 if given.quick else given.rounds
    bench = Bench(given.base.absolute(), given.general, rounds, given.quick, given.json, given.minutes)
    if given.add and given.json and given.json.exists():
        bench.go_on(msgspec.json.decode(given.json.read_bytes(), type=Findings))
    parts: dict[str, Callable[[], Any]] = {name: getattr(bench, name) for name in PARTS}
    for name in given.parts.split(","):
        parts[name]()
        bench.keep()
    if not given.quick:
        say(f"wrote {write_page(bench.findings, given.docs)}")


if __name__ == "__main__":
    main()
