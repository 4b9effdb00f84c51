"""`make bench-forgetting`: sequences of tasks, one update each; what does each strategy keep?

`python -m bench.forgetting [--tasks DIR | --lore TASKS,FACTS] [--strategies naive,replay,...] [--seeds 0,1,2]`

Every cell (sequence, strategy, seed) goes the way of the daemon: rows into a journal, an experience cut out of it,
`python -m strategies.train` on it, the candidate published as a version that the next update continues from. After each
update all tasks are scored, future ones too, and so is the base before the first: R[i, j]. Finished cells are kept in
`.bench/forgetting/` and skipped; the table and the plots go to `docs/`.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from bench.forgetting_report import Cell, write_report
from bench.scoring import Drift, Task, TaskRow, drift, read_task, task_score
from buffers import experience, journal
from buffers.example import Origin
from daemon import publish, update
from daemon.config import Model
from daemon.state.database import Connection, open_database, transaction
from strategies.adapter import Adapter, load_adapter
from strategies.catalog import AGem, Distill, Ewc, Gem, Replay, Strategy
from strategies.lore import generate, rows
from strategies.request import EXIT_TRAINED, Lora, RunReport, Training, read_report, write

ROOT = Path(__file__).resolve().parent.parent
MODEL = "bench"
JOINT = "joint"
"""All tasks in one update: the ceiling, not a strategy."""
GENERAL = Replay(ratio=0.0, general_ratio=0.1)
RECIPES: dict[str, list[Strategy]] = {
    "naive": [],
    "replay": [Replay(ratio=0.2)],
    "ewc": [Ewc()],
    "agem": [AGem()],
    "gem": [Gem()],
    "distill": [GENERAL, Distill(on="general")],
    "replay+distill": [Replay(ratio=0.2, general_ratio=0.1), Distill(on="general")],
    "replay+distill+ewc": [Replay(ratio=0.2, general_ratio=0.1), Distill(on="general"), Ewc()],
    JOINT: [],
}


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
    buffer_examples: int = 2000
    probes: tuple[str, ...] = ()
    """General text for drift: neither trained on nor rehearsed."""

    @property
    def anchors(self) -> Path:
        """General text that strategies may rehearse."""
        return self.work / "anchors"

    def epochs(self, task: Task) -> int:
        """Enough to be learned, and hot enough to forget what was before."""
        return self.option_epochs if task.has_options else max(1, round(self.fact_presentations / len(task.train)))

    def limited(self, task: Task) -> Task:
        """The task with as many rows as this bench takes."""
        train = task.train[: self.option_rows] if task.has_options else task.train
        return replace(task, train=train, test=task.test[: self.test_rows])


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the report over everything that was measured in this setting."""
    given = _parser().parse_args(arguments)
    setting = setting_of(given)
    recipes = RECIPES | (_read_recipes(given.recipes) if given.recipes else {})
    torch.set_num_threads(setting.threads)
    adapter = load_adapter(setting.base, Lora(rank=setting.rank, alpha=2.0 * setting.rank))
    cells = []
    for seed in given.seeds:
        sequence = [setting.limited(task) for task in tasks_of(given, seed)]
        for name in given.strategies:
            cells.append(cell(setting, adapter, sequence, name, recipes[name], seed))
            print(cells[-1].summary(), flush=True)
    write_report(cells, given.title, given.docs)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.forgetting", description="What each strategy keeps.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tasks", type=Path, help="directory of NAME.train.jsonl and NAME.test.jsonl")
    source.add_argument("--lore", type=_numbers, default=[4, 40], help="TASKS,FACTS of generated lore [4,40]")
    parser.add_argument("--order", type=_names, help="task names in their order [all, by name]")
    parser.add_argument("--strategies", type=_names, default=["naive", "replay", "replay+distill"])
    parser.add_argument("--recipes", type=Path, help="TOML: NAME = [{name = 'replay', ratio = 0.3}, ...]")
    parser.add_argument("--seeds", type=_numbers, default=[0])
    parser.add_argument("--base", type=Path, default=ROOT / ".cache" / "base" / "smollm2-135m")
    parser.add_argument("--general", type=Path, default=ROOT / "examples" / "biblioteca" / "general")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "forgetting")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--title", default="lore", help="names the files in docs/")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="two small tasks of lore: a smoke, not a measurement")
    return parser


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def setting_of(given: argparse.Namespace) -> Setting:
    """The setting of the command line, with the general text divided: every other file is for drift alone."""
    files = sorted(given.general.glob("*.txt"))
    probes = [text.strip() for file in files[1::2] for text in file.read_text("utf-8").split("\n\n") if text.strip()]
    setting = Setting(
        base=given.base, work=given.work / given.title, learning_rate=given.learning_rate, rank=given.rank,
        threads=given.threads, test_rows=given.test_rows, probes=tuple(probes),
    )  # fmt: skip
    setting.anchors.mkdir(parents=True, exist_ok=True)
    for file in files[::2]:
        shutil.copyfile(file, setting.anchors / file.name)
    if given.quick:
        given.lore, given.tasks = [2, 8], None
        return replace(setting, work=setting.work / "quick", fact_presentations=256, test_rows=24)
    return setting


def _read_recipes(path: Path) -> dict[str, list[Strategy]]:
    return msgspec.convert(tomllib.loads(path.read_text("utf-8")), dict[str, list[Strategy]])


def tasks_of(given: argparse.Namespace, seed: int) -> list[Task]:
    """The sequence: read from files, or lore that is invented anew for every seed."""
    if given.tasks is None:
        return [
            Task(facts[0].task, *([TaskRow(row.prompt, row.completion) for row in rows(facts, side)]
                                  for side in ("train", "test")))
            for facts in generate(seed, *given.lore)
        ]  # fmt: skip
    names = given.order or sorted(path.name.removesuffix(".train.jsonl") for path in given.tasks.glob("*.train.jsonl"))
    return [read_task(given.tasks, name) for name in names]


def cell(
    setting: Setting, adapter: Adapter, sequence: list[Task], name: str, recipe: list[Strategy], seed: int
) -> Cell:
    """One sequence with one strategy; taken from disk when it was finished before in the same setting."""
    directory = setting.work / f"{name}-seed{seed}"
    wanted = Cell(
        strategy=name, seed=seed, tasks=[task.name for task in sequence], recipe=[repr(each) for each in recipe],
        learning_rate=setting.learning_rate,
    )  # fmt: skip
    if (directory / "cell.json").exists():
        found = msgspec.json.decode((directory / "cell.json").read_bytes(), type=Cell)
        if found.is_same_setting(wanted):
            return found
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    measured = measure(setting, adapter, sequence, directory, recipe, wanted)
    write(directory / "cell.json", measured)
    for bulk in ("versions", "runs"):
        shutil.rmtree(directory / bulk)
    return measured


def measure(
    setting: Setting, adapter: Adapter, sequence: list[Task], directory: Path, recipe: list[Strategy], wanted: Cell
) -> Cell:
    """Train the sequence update by update and score after each."""
    with adapter.disabled():
        before = [task_score(adapter, task) for task in sequence]
        start = drift(adapter, setting.probes)
    scored: list[list[float]] = []
    drifts: list[Drift] = []
    seconds = 0.0
    with journal_at(directory) as connection:
        for number, task in enumerate(_updates(sequence, wanted.strategy), 1):
            report = learn(setting, connection, directory, task, number, recipe, wanted.seed)
            seconds += report.seconds["train"]
            adapter.load(version(directory, number))
            scored.append([task_score(adapter, each) for each in sequence])
            drifts.append(drift(adapter, setting.probes))
            print(f"  {wanted.strategy} {task.name}: " + " ".join(f"{each:.2f}" for each in scored[-1]), flush=True)
    return msgspec.structs.replace(
        wanted, before=before, scores=scored, train_seconds=seconds, drift_kl=[each.kl for each in drifts],
        drift_nll=[each.nll - start.nll for each in drifts],
    )  # fmt: skip


def _updates(sequence: list[Task], strategy: str) -> list[Task]:
    if strategy != JOINT:
        return sequence
    return [Task(JOINT, [row for task in sequence for row in task.train], sequence[0].test)]


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


def learn(
    setting: Setting, connection: Connection, directory: Path, task: Task, number: int, recipe: list[Strategy],
    seed: int,
) -> RunReport:  # fmt: skip
    """One update as the daemon makes it, but for the gate: what is measured here is what a gate would see."""
    run_id, run_directory = f"{MODEL}-{number:05d}", directory / "runs" / f"{number:05d}"
    run_directory.mkdir(parents=True)
    model = Model(
        base_path=setting.base, engine="none", lora=Lora(rank=setting.rank, alpha=2.0 * setting.rank),
        training=Training(learning_rate=setting.learning_rate, epochs=setting.epochs(task), early_stop_patience=0),
        strategy=recipe, general_directory=setting.anchors, threads=setting.threads, seed=seed, canary_prompts=[],
    )  # fmt: skip
    items = [(row.example, Origin(file=task.name, line=line)) for line, row in enumerate(task.train, 1)]
    with transaction(connection):
        journal.add(connection, MODEL, items, heldout_fraction=0.0)
        journal.claim(connection, MODEL, run_id, len(items))
    cut = experience.cut(connection, MODEL, run_id, number, update.recipe_of(model), run_directory / "experience.jsonl")
    parent = version(directory, number - 1) if number > 1 else None
    request = update.request_of(
        model, run_id=run_id, name=MODEL, update_number=number, parent=parent, experience_sha256=cut.sha256,
        cache=setting.work / "cache",
    )  # fmt: skip
    write(run_directory / "request.json", request)
    report = train(run_directory)
    manifest = publish.manifest_of(
        report, model=MODEL, number=number, parent=None, run_id=run_id, update_number=number,
        experience_sha256=cut.sha256,
    )  # fmt: skip
    publish.publish(run_directory, version(directory, number), manifest)
    with transaction(connection):
        journal.consume(connection, run_id, number)
    return report


def train(run_directory: Path) -> RunReport:
    """`python -m strategies.train` on a prepared run; raises `RuntimeError` with the reason of a failure."""
    with (run_directory / "train.log").open("wb") as log:
        status = subprocess.run(
            [sys.executable, "-m", "strategies.train", str(run_directory)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            check=False,
        ).returncode
    report = read_report(run_directory)
    if status != EXIT_TRAINED or report is None:
        reason = report.reason if report else (run_directory / "train.log").read_text("utf-8", "replace")[-500:]
        raise RuntimeError(f"{run_directory}: the trainer ended with {status}: {reason}")
    return report


if __name__ == "__main__":
    sys.exit(main())
