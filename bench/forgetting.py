"""`make bench-forgetting`: sequences of tasks, one update each; what does each strategy keep?

`python -m bench.forgetting [--tasks DIR | --lore TASKS,FACTS] [--strategies naive,replay,...] [--seeds 0,1,2]`

Every cell (sequence, strategy, seed) goes the way of the daemon (see `bench.chain`). After each update all tasks are
scored, future ones too, and so is the base before the first: R[i, j]. Finished cells are kept in `.bench/forgetting/`
and skipped; the table and the plots go to `docs/`.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import math
import random
import shutil
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from bench import chain
from bench.chain import ROOT, Setting
from bench.forgetting_report import Cell, write_report
from bench.scoring import Task, TaskRow, drift, read_task, task_score
from buffers.experience import Recipe, general_rows
from buffers.policy import Buffer
from strategies.adapter import Adapter, load_adapter
from strategies.catalog import (
    AGem,
    Augment,
    Avalanche,
    DerPlusPlus,
    Distill,
    Ewc,
    Freeze,
    Gem,
    Kronecker,
    MemoryAwareSynapses,
    OLora,
    Replay,
    Rewrite,
    Strategy,
    SynapticIntelligence,
)
from strategies.general import kept_or_written
from strategies.lore import Fact, generate, rows
from strategies.request import Lora, Training, write


class OutOfTime(Exception):
    """No further update may begin in this call."""


PARTIAL = "partial.json"
"""What has been measured of a cell so far."""
UNFINISHED = 75
JOINT = "joint"
"""All tasks in one update: the ceiling, not a strategy."""
REPLAY = Replay(general_ratio=0.0)
"""Without general text: what rehearsal alone keeps."""
RECIPES: dict[str, list[Strategy]] = {
    "naive": [],
    "default": [Replay(), Distill()],
    "replay": [REPLAY],
    "distill": [Replay(ratio=0.0), Distill()],
    "ewc": [Ewc()],
    "gem": [Gem(examples=8)],
    "agem": [AGem(examples=8)],
    "kronecker": [Kronecker()],
    "si": [SynapticIntelligence()],
    "mas": [MemoryAwareSynapses()],
    "olora": [OLora()],
    "freeze": [Freeze()],
    "replay+derpp": [REPLAY, DerPlusPlus()],
    "replay+mir": [REPLAY, Avalanche(plugin="MIRPlugin")],
    "replay+noise": [REPLAY, Augment()],
    "replay+templates": [REPLAY, Rewrite()],
    "replay+paraphrases": [REPLAY, Rewrite(templates=False, paraphrases=True)],
    "default+ewc": [Replay(), Distill(), Ewc()],
    JOINT: [],
}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the report over everything that was measured in this setting."""
    given = _parser().parse_args(arguments)
    setting = setting_of(given)
    if given.report:
        write_report(kept(setting, given.strategies, given.seeds), given.title, given.docs)
        return 0
    recipes = RECIPES | (_read_recipes(given.recipes) if given.recipes else {})
    torch.set_num_threads(setting.threads)
    adapter = load_adapter(setting.base, Lora(rank=setting.rank, alpha=2.0 * setting.rank))
    if not setting.probes:
        setting = replace(setting, probes=own_words(setting, adapter))
    cells: list[Cell] = []
    until = time.monotonic() + given.seconds
    for name, seed in [(name, seed) for seed in given.seeds for name in given.strategies]:
        sequence = [setting.limited(task) for task in tasks_of(given, seed)]
        wanted = cell_of(setting, sequence, name, recipes[name], seed)
        try:
            cells.append(finished(setting, wanted) or cell(setting, adapter, sequence, recipes[name], wanted, until))
        except OutOfTime:
            print("to be continued: the same command goes on from here", flush=True)
            return UNFINISHED
        print(cells[-1].summary(), flush=True)
    write_report(sorted(cells, key=lambda each: given.strategies.index(each.strategy)), given.title, given.docs)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.forgetting", description="What each strategy keeps.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tasks", type=Path, help="directory of NAME.train.jsonl and NAME.test.jsonl")
    source.add_argument("--lore", type=_numbers, default=[4, 40], help="TASKS,FACTS of generated lore [4,40]")
    parser.add_argument("--order", type=_names, help="task names in their order [all, by name]")
    parser.add_argument("--strategies", type=_names, default=["naive", "replay", "default"])
    parser.add_argument("--recipes", type=Path, help="TOML or JSON: NAME = [{name = 'replay'}, ...]")
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
    parser.add_argument("--presentations", type=int, default=960, help="rows that an update of facts shows [960]")
    parser.add_argument("--batch-examples", type=int, default=Training().batch_examples, help="of an optimiser step")
    parser.add_argument("--heldout", type=float, default=0.0, help="share of the rows that trainers evaluate on [0]")
    parser.add_argument("--buffer", type=int, default=2000, help="places of the replay buffer [2000]")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no update later; exit code 75 then")
    parser.add_argument("--report", action="store_true", help="train nothing: the page over the cells that are there")
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
        base=given.base.absolute(), work=given.work.absolute() / given.title, learning_rate=given.learning_rate,
        rank=given.rank, threads=given.threads, test_rows=given.test_rows, fact_presentations=given.presentations,
        heldout_fraction=given.heldout, training={"batch_examples": given.batch_examples},
        buffer=Buffer(examples=given.buffer), probes=tuple(probes),
    )  # fmt: skip
    setting.anchors.mkdir(parents=True, exist_ok=True)
    for file in files[::2]:
        shutil.copyfile(file, setting.anchors / file.name)
    if given.quick:
        given.lore, given.tasks = [2, 8], None
        return replace(setting, work=setting.work / "quick", fact_presentations=256, test_rows=24)
    return setting


def own_words(setting: Setting, adapter: Adapter) -> tuple[str, ...]:
    """Without general text: what the base model wrote itself, those texts that no trainer rehearses."""
    written = kept_or_written(setting.base, setting.work / "cache", adapter)
    found = general_rows(written, 0, Recipe().probe_texts, random.Random(0))
    return tuple(row.example.completion for row in found)


def _read_recipes(path: Path) -> dict[str, list[Strategy]]:
    read = json.loads if path.suffix == ".json" else tomllib.loads
    return msgspec.convert(read(path.read_text("utf-8")), dict[str, list[Strategy]])


def tasks_of(given: argparse.Namespace, seed: int) -> list[Task]:
    """The sequence: read from files, or lore that is invented anew for every seed."""
    if given.tasks is None:
        return [
            Task(facts[0].task, _rows(facts, "train"), _rows(facts, "test")) for facts in generate(seed, *given.lore)
        ]
    names = given.order or sorted(path.name.removesuffix(".train.jsonl") for path in given.tasks.glob("*.train.jsonl"))
    return [read_task(given.tasks, name) for name in names]


def _rows(facts: list[Fact], side: str) -> list[TaskRow]:
    return [TaskRow(row.prompt, row.completion) for row in rows(facts, side)]


def cell_of(setting: Setting, sequence: list[Task], name: str, recipe: list[Strategy], seed: int) -> Cell:
    """A cell that has yet to be measured."""
    return Cell(
        strategy=name, seed=seed, tasks=[task.name for task in sequence], recipe=[repr(each) for each in recipe],
        learning_rate=setting.learning_rate, batch_examples=int(setting.training["batch_examples"]),
    )  # fmt: skip


def kept(setting: Setting, strategies: list[str], seeds: list[int]) -> list[Cell]:
    """The finished cells, strategy by strategy, at whatever learning rate and however many examples a step."""
    found = [
        each
        for file in sorted(setting.work.glob("*/cell.json"))
        if (each := msgspec.json.decode(file.read_bytes(), type=Cell)).strategy in strategies and each.seed in seeds
    ]  # fmt: skip
    if not found:
        raise SystemExit(f"{setting.work}: no cell of these strategies and seeds is finished")
    return sorted(found, key=lambda each: (strategies.index(each.strategy), each.seed))


def finished(setting: Setting, wanted: Cell) -> Cell | None:
    """The cell as it was measured before in the same setting; None where it was not."""
    file = setting.work / f"{wanted.strategy}-seed{wanted.seed}" / "cell.json"
    if not file.exists():
        return None
    found = msgspec.json.decode(file.read_bytes(), type=Cell)
    return found if found.is_same_setting(wanted) else None


def cell(
    setting: Setting, adapter: Adapter, sequence: list[Task], recipe: list[Strategy], wanted: Cell, until: float
) -> Cell:
    """Measure one sequence with one strategy, and keep what was found; raises `OutOfTime`."""
    directory = setting.work / f"{wanted.strategy}-seed{wanted.seed}"
    measured = measure(setting, adapter, sequence, directory, recipe, wanted, until)
    write(directory / "cell.json", measured)
    (directory / PARTIAL).unlink()
    for bulk in ("versions", "runs"):
        shutil.rmtree(directory / bulk)
    return measured


def measure(
    setting: Setting, adapter: Adapter, sequence: list[Task], directory: Path, recipe: list[Strategy], wanted: Cell,
    until: float = math.inf,
) -> Cell:  # fmt: skip
    """Train the sequence update by update and score after each; goes on where it was left."""
    measured = _begun(setting, adapter, sequence, directory, wanted)
    with chain.journal_at(directory) as connection:
        for number, task in enumerate(updates_of(sequence, wanted.strategy, setting), 1):
            if len(measured.costs) < number:
                if time.monotonic() > until:
                    raise OutOfTime
                _, cost = chain.learn(setting, connection, directory, task, number, recipe, wanted.seed)
                measured = msgspec.structs.replace(measured, costs=[*measured.costs, cost])
                write(directory / PARTIAL, measured)
            if len(measured.scores) < number:
                adapter.load(chain.version(directory, number))
                measured = _scored(setting, adapter, sequence, measured)
                write(directory / PARTIAL, measured)
                scores = " ".join(f"{each:.2f}" for each in measured.scores[-1])
                print(f"  {wanted.strategy} {task.name}: {scores}", flush=True)
    return measured


def _begun(setting: Setting, adapter: Adapter, sequence: list[Task], directory: Path, wanted: Cell) -> Cell:
    """What an earlier call has measured of the cell; without one its base row."""
    if (directory / PARTIAL).exists():
        found = msgspec.json.decode((directory / PARTIAL).read_bytes(), type=Cell)
        if found.is_same_setting(wanted):
            return found
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with adapter.disabled():
        before = [task_score(adapter, task) for task in sequence]
        nll = drift(adapter, setting.probes).nll
    begun = msgspec.structs.replace(wanted, before=before, nll_before=nll)
    write(directory / PARTIAL, begun)
    return begun


def _scored(setting: Setting, adapter: Adapter, sequence: list[Task], measured: Cell) -> Cell:
    """With the scores of the adapter's present weights."""
    scores, moved = [task_score(adapter, each) for each in sequence], drift(adapter, setting.probes)
    return msgspec.structs.replace(
        measured, scores=[*measured.scores, scores], drift_kl=[*measured.drift_kl, moved.kl],
        drift_nll=[*measured.drift_nll, moved.nll - measured.nll_before],
    )  # fmt: skip


def updates_of(sequence: list[Task], strategy: str, setting: Setting) -> list[Task]:
    """One update per task; for joint training one in all, that shows every row as often as the sequence does."""
    if strategy != JOINT:
        return sequence
    showings = tuple(setting.epochs(task) for task in sequence for _ in task.train)
    return [Task(JOINT, [row for task in sequence for row in task.train], sequence[0].test, showings)]


if __name__ == "__main__":
    sys.exit(main())
