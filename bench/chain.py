"""A chain of updates as the daemon makes them, but for the gate: what is measured is what a gate would see.

Rows into a journal, an experience cut out of it, `python -m strategies.train` on it, the candidate published as a
version that the next update continues from. Older versions are removed as the daemon's retention would.
"""

import hashlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from bench.forgetting_report import Cost
from bench.scoring import Task
from buffers import claims, experience, journal
from buffers.example import Origin
from buffers.policy import Buffer
from daemon import publish, update
from daemon.config import Model
from daemon.state.database import Connection, open_database, transaction
from strategies.catalog import Strategy
from strategies.request import EXIT_TRAINED, Lora, RunReport, Training, read_report, write

ROOT = Path(__file__).resolve().parent.parent
MODEL = "bench"
VERSIONS_KEPT = 2
"""The served one and its parent: the fewest that the daemon's configuration allows."""


@dataclass(frozen=True)
class Setting:
    """What all cells of a bench share."""

    base: Path
    work: Path
    learning_rate: float = 5e-4
    rank: int = 16
    threads: int = 1
    fact_presentations: int = 960
    """Training rows that a task of facts shows, over all epochs: 120 facts x 8 epochs."""
    option_rows: int = 128
    option_epochs: int = 2
    test_rows: int = 200
    """At most so many test rows per task."""
    heldout_fraction: float = 0.0
    """Share of an update's rows that its trainer evaluates on, as under the daemon, instead of learning them."""
    buffer: Buffer = field(default_factory=Buffer)
    dropout: float = Lora().dropout
    training: Mapping[str, float] = field(default_factory=dict)
    """Keys of `[models.NAME.training]` that this bench sets otherwise."""
    probes: tuple[str, ...] = ()
    """General text for drift: neither trained on nor rehearsed."""

    @property
    def anchors(self) -> Path:
        """General text that strategies may rehearse."""
        return self.work / "anchors"

    def epochs(self, task: Task) -> int:
        """Enough to be learned, and hot enough to forget what was before."""
        if task.showings:
            return 1
        return self.option_epochs if task.has_options else max(1, round(self.fact_presentations / len(task.train)))

    def limited(self, task: Task) -> Task:
        """The task with as many rows as this bench takes."""
        train = task.train[: self.option_rows] if task.has_options else task.train
        return replace(task, train=train, test=task.test[: self.test_rows])


@contextmanager
def journal_at(directory: Path) -> Iterator[Connection]:
    """A database of the daemon's own making."""
    connection = open_database(directory / "eternad.db")
    try:
        yield connection
    finally:
        connection.close()


def version(directory: Path, number: int) -> Path:
    """Where the version of an update lies."""
    return publish.directory_of(directory / "versions", MODEL, number)


def model_of(setting: Setting, task: Task, recipe: list[Strategy], seed: int) -> Model:
    """The configuration under which a task is learned."""
    training = {"learning_rate": setting.learning_rate, "epochs": setting.epochs(task), "early_stop_patience": 0}
    return Model(
        base_path=setting.base, engine="none",
        lora=Lora(rank=setting.rank, alpha=2.0 * setting.rank, dropout=setting.dropout),
        training=msgspec.convert({**training, **setting.training}, Training),
        strategy=recipe, buffer=setting.buffer, general_directory=setting.anchors, threads=setting.threads, seed=seed,
        canary_prompts=[],
    )  # fmt: skip


def learn(
    setting: Setting, connection: Connection, directory: Path, task: Task, number: int, recipe: list[Strategy],
    seed: int,
) -> tuple[RunReport, Cost]:  # fmt: skip
    """One update: what its trainer said of it, and what it cost."""
    run_id, run_directory = f"{MODEL}-{number:05d}", directory / "runs" / f"{number:05d}"
    run_directory.mkdir(parents=True, exist_ok=True)  # a bench that was stopped goes on with the run
    model = model_of(setting, task, recipe, seed)
    items = [(row.example, Origin(file=task.name, line=line)) for line, row in enumerate(task.train, 1)]
    with transaction(connection):
        journal.add(connection, MODEL, items, heldout_fraction=setting.heldout_fraction)
        claims.claim(connection, MODEL, run_id, len(items))
    file = run_directory / "experience.jsonl"
    cut = experience.cut(connection, MODEL, run_id, number, update.recipe_of(model), file)
    sha256 = _show_again(file, task) if task.showings else cut.sha256
    request = update.request_of(
        model, run_id=run_id, name=MODEL, update_number=number,
        parent=version(directory, number - 1) if number > 1 else None,
        experience_sha256=sha256, cache=setting.work / "cache",
    )  # fmt: skip
    write(run_directory / "request.json", request)
    began = _cpu_seconds()
    report = train(run_directory)
    cpu_seconds = _cpu_seconds() - began
    manifest = publish.manifest_of(
        report, model=MODEL, number=number, parent=None, run_id=run_id, update_number=number,
        experience_sha256=sha256,
    )  # fmt: skip
    publish.publish(run_directory, version(directory, number), manifest)
    with transaction(connection):
        claims.consume(connection, run_id, number)
    return report, _cost(directory, connection, number, report, cpu_seconds)


def _show_again(file: Path, task: Task) -> str:
    """Write every new row of an experience as often as the task says; the journal keeps each example once."""
    showings = {row.example: count for row, count in zip(task.train, task.showings, strict=True)}
    rows = [row for row in experience.read(file) for _ in range(showings[row.example] if row.role == "new" else 1)]
    file.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _cpu_seconds() -> float:
    """Of all children that have ended: wall time says more about a machine's other work than about an update."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cost(directory: Path, connection: Connection, number: int, report: RunReport, cpu_seconds: float) -> Cost:
    """What the update took, after retention has removed what nobody needs any more."""
    for name in ("adapter", "strategy"):
        shutil.rmtree(directory / "runs" / f"{number:05d}" / name)
    if number > VERSIONS_KEPT:
        shutil.rmtree(version(directory, number - VERSIONS_KEPT))
    return Cost(
        cpu_seconds=cpu_seconds, tokens=report.tokens, peak_memory_bytes=report.peak_memory_bytes,
        version_bytes=bytes_under(version(directory, number)), kept_bytes=bytes_under(directory / "versions"),
        journal_bytes=_journal_bytes(connection),
    )  # fmt: skip


def _journal_bytes(connection: Connection) -> int:
    """Of the database alone: its write-ahead log grows to 4 MiB and is written over from there, whatever is in it."""
    return int(
        connection.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()[0]
    )


def bytes_under(directory: Path) -> int:
    """Of all files in a directory, however deep."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def train(run_directory: Path) -> RunReport:
    """`python -m strategies.train` on a prepared run; raises `RuntimeError` with the reason of a failure."""
    with (run_directory / "train.log").open("wb") as log:
        status = subprocess.run(
            [sys.executable, "-m", "strategies.train", str(run_directory)],
            cwd=ROOT, stdout=log, stderr=log, check=False,
        ).returncode  # fmt: skip
    report = read_report(run_directory)
    if status != EXIT_TRAINED or report is None:
        reason = report.reason if report else (run_directory / "train.log").read_text("utf-8", "replace")[-500:]
        raise RuntimeError(f"{run_directory}: the trainer ended with {status}: {reason}")
    return report
