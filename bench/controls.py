"""`make bench-controls`: what each control against overfitting does to what is learned, in a small setting.

`python -m bench.controls [--facts 40] [--seeds 0,1,2] [--only NAME NAME ...]`

One update of invented facts, each in a single wording or as prose, long enough to be learned by heart; a control is
switched on or off, everything else stays, and the number of rows shown as well. Asked is in words that were never
trained: recall and loss there tell what was understood, the loss on the trained rows what was memorised. Every update
goes the way of the daemon (`bench.chain`). Cells are kept in `.bench/controls/`; the table goes to `docs/controls.md`.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch

from bench import chain
from bench.chain import ROOT, Setting
from bench.controls_report import Cell, write_report
from bench.scoring import Task, TaskRow, drift, recalled
from bench.teacher import teaching
from buffers.experience import Row
from strategies.adapter import Adapter, load_adapter
from strategies.catalog import Augment, Avalanche, Rewrite, Strategy
from strategies.dataset import tokenise
from strategies.forward import token_losses
from strategies.lore import Fact, generate
from strategies.request import Lora, write

EPOCHS = 12


@dataclass(frozen=True)
class Control:
    """One cell: what differs from the program's own settings."""

    training: dict[str, float] = field(default_factory=dict)
    """Keys of `[models.NAME.training]`."""
    dropout: float = Lora().dropout
    heldout: float = 0.0
    strategies: tuple[Strategy, ...] = ()
    prose: bool = False
    """The facts come as prose about each subject instead of as questions."""
    wordings: int = 1
    """Rows that become of a new one; the epochs are divided by it, so that as much is shown."""
    is_taught: bool = False
    """Whether the teacher of the bench answers: one that is always right."""


BY_SENTENCES = Rewrite(rows=2)
BY_CHUNKS = Rewrite(rows=2, sentences=False, chunks=True)
BY_PARAPHRASES = Rewrite(rows=1, templates=False, paraphrases=True)
BY_QUESTIONS = Rewrite(rows=2, sentences=False, questions=True)
BY_ALL_QUESTIONS = Rewrite(rows=8, sentences=False, questions=True)
CONTROLS = {
    "as shipped": Control(),
    "weight decay 0": Control({"weight_decay": 0.0}),
    "weight decay 0.1": Control({"weight_decay": 0.1}),
    "dropout 0": Control(dropout=0.0),
    "dropout 0.2": Control(dropout=0.2),
    "no clipping": Control({"clip_norm": 1e9}),
    "no warm-up": Control({"warmup_share": 0.0}),
    "constant learning rate": Control(
        strategies=(Avalanche(parameters={"scheduler": "ConstantLR", "factor": 1.0, "total_iters": 0}),)
    ),
    "a fifth held out": Control(heldout=0.2),
    "a fifth held out, early stopping": Control({"early_stop_patience": 1}, heldout=0.2),
    "a fifth held out, may rise by 2": Control({"early_stop_patience": 1, "early_stop_new_loss": 2.0}, heldout=0.2),
    "`augment` (noise 5)": Control(strategies=(Augment(),)),
    "`rewrite` templates": Control(strategies=(Rewrite(rows=2),), wordings=3),
    "`rewrite` paraphrases": Control(strategies=(BY_PARAPHRASES,), wordings=2, is_taught=True),
    "prose": Control(prose=True),
    "prose, `rewrite` sentences": Control(strategies=(BY_SENTENCES,), wordings=3, prose=True),
    "prose, `rewrite` chunks": Control(strategies=(BY_CHUNKS,), wordings=3, prose=True),
    "prose, `rewrite` questions": Control(strategies=(BY_QUESTIONS,), wordings=3, prose=True, is_taught=True),
    "prose, 8 questions, 12 epochs": Control(strategies=(BY_ALL_QUESTIONS,), prose=True, is_taught=True),
}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the table over everything that was asked for."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    setting = Setting(
        base=given.base.absolute(), work=given.work.absolute(), learning_rate=given.learning_rate,
        probes=_paragraphs(given.general),
    )  # fmt: skip
    setting.anchors.mkdir(parents=True, exist_ok=True)
    adapter = load_adapter(setting.base, Lora(rank=setting.rank, alpha=2.0 * setting.rank))
    cells = []
    for name in given.only or CONTROLS:
        for seed in given.seeds:
            facts = generate(seed, 1, given.facts)[0]
            cells.append(cell(setting, adapter, facts, name, seed))
            print(cells[-1].summary(), flush=True)
    write_report(cells, given.facts, EPOCHS, given.docs)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.controls", description="What controls against overfitting do.")
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTROLS, metavar="NAME", help="names of controls [all]")
    parser.add_argument("--base", type=Path, default=ROOT / ".cache" / "base" / "smollm2-135m")
    parser.add_argument("--general", type=Path, default=ROOT / "examples" / "biblioteca" / "general")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "controls")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser


def _paragraphs(general: Path) -> tuple[str, ...]:
    texts = [file.read_text("utf-8") for file in sorted(general.glob("*.txt"))]
    return tuple(part.strip() for text in texts for part in text.split("\n\n") if part.strip())


def cell(setting: Setting, adapter: Adapter, facts: list[Fact], name: str, seed: int) -> Cell:
    """One update under one control; taken from disk when it was measured before."""
    directory = setting.work / f"{list(CONTROLS).index(name):02}-seed{seed}"
    wanted = Cell(control=name, seed=seed, setting=repr((CONTROLS[name], setting.learning_rate, len(facts))))
    if (directory / "cell.json").exists():
        found = msgspec.json.decode((directory / "cell.json").read_bytes(), type=Cell)
        if found.setting == wanted.setting:
            return found
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    measured = measure(setting, adapter, facts, directory, CONTROLS[name], wanted)
    write(directory / "cell.json", measured)
    for bulk in ("versions", "runs"):
        shutil.rmtree(directory / bulk)
    return measured


def measure(
    setting: Setting, adapter: Adapter, facts: list[Fact], directory: Path, control: Control, wanted: Cell
) -> Cell:
    """Train one update and ask in other words."""
    task = task_of(facts, prose=control.prose)
    own = replace(
        setting, heldout_fraction=control.heldout, dropout=control.dropout,
        training={"epochs": max(EPOCHS // control.wordings, 1), **control.training},
    )  # fmt: skip
    with teaching(facts) as url, chain.journal_at(directory) as connection:
        recipe = [_taught(each, url) if control.is_taught else each for each in control.strategies]
        report, _ = chain.learn(own, connection, directory, task, 1, recipe, wanted.seed)
    adapter.load(chain.version(directory, 1))
    right = recalled(adapter, task.test)
    return msgspec.structs.replace(
        wanted, recall=sum(right) / len(right), loss_asked=_loss(adapter, task.test),
        loss_trained=_loss(adapter, task.train), drift_kl=drift(adapter, setting.probes).kl,
        epochs=report.epochs, derived=report.examples.get("derived", 0),
    )  # fmt: skip


def _taught(strategy: Strategy, url: str) -> Strategy:
    return msgspec.structs.replace(strategy, teacher_url=url) if isinstance(strategy, Rewrite) else strategy


def task_of(facts: list[Fact], *, prose: bool) -> Task:
    """Each fact in one wording, or one text about each subject; tested in words that neither has."""
    tests = [TaskRow(prompt, f" {fact.answer}") for fact in facts for prompt in fact.tested]
    if not prose:
        return Task("facts", [TaskRow(fact.trained[0], f" {fact.answer}") for fact in facts], tests)
    subjects = dict.fromkeys(fact.subject for fact in facts)
    texts = [
        " ".join(f"{fact.trained[3]} {fact.answer}." for fact in facts if fact.subject == each) for each in subjects
    ]
    return Task("prose", [TaskRow("", text) for text in texts], tests)


def _loss(adapter: Adapter, rows: list[TaskRow]) -> float:
    """Nats per token of the answers."""
    items = [
        tokenise(Row(role="eval", update=0, id=0, example=row.example), place, adapter.tokenizer, 1024)
        for place, row in enumerate(rows)
    ]
    return float(token_losses(adapter, items).mean())


if __name__ == "__main__":
    sys.exit(main())
