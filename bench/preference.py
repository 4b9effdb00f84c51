"""`make bench-preference`: does a version that knows facts learn what players prefer, and still know the facts?

Update 1 learns generated lore. Update 2 learns comparisons (DPO), or ratings (KTO), or stars (KTO by each subject's own
scale), each in a copy of the same library: through ingest, journal, experience, trainer and gate, with replay and
`distill`. Tested are pairs that were never taken in (`bench.preference_world`), and the facts in other words than they
were taught. One line of JSON per kind, and `.bench/preference/` keeps the libraries: what was measured is not again.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import msgspec
import torch

from bench import chain
from bench.chain import ROOT
from bench.preference_world import Kind, Pair, Part, pairs, records
from bench.scoring import TaskRow, recalled
from bench.site import Site
from buffers import claims, experience
from buffers.example import Example, Message
from buffers.experience import Row
from daemon import gate, publish, update
from daemon.config import Model
from daemon.state.database import transaction
from daemon.trust.metric import Metric
from daemon.trust.policy import Source, Trust
from strategies import lore
from strategies.adapter import Adapter, load_adapter
from strategies.catalog import Distill, Replay
from strategies.dataset import tokenise
from strategies.forward import completion_logprobs
from strategies.request import Lora, Training, read_request, write

NOW = 1_800_000_000.0


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Share of tested pairs whose liked answer is the more probable one; no reference model takes part."""

    summed: float
    """By the log-probability of the whole answer."""
    per_token: float
    """By its mean over the answer's tokens: no answer gains by being short."""


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of feedback, learned after the facts."""

    kind: Kind
    seed: int
    pairs: int
    """Tested ones."""
    examples: dict[str, int]
    """Rows of the update by role."""
    preference: dict[Part, dict[str, Accuracy]]
    """Of tests in familiar words and of those in strange ones: under the base, before the update and after it."""
    facts: dict[str, float]
    """Share of the facts' questions, in other words than taught, that are answered right: before and after."""
    backward_transfer: float
    """Percentage points by which the facts changed."""
    gate: str
    reason: str
    drift: float
    """KL(base || candidate) on general text, nats per token."""
    train_seconds: float


def model_of(base: Path, learning_rate: float, epochs: int, seed: int) -> Model:
    """The recipe of docs/strategies.md for models below a billion parameters."""
    return Model(
        base_path=base, engine="none", lora=Lora(rank=16, alpha=32.0), seed=seed, canary_prompts=[],
        training=Training(learning_rate=learning_rate, epochs=epochs, early_stop_patience=0),
        strategy=[Replay(ratio=0.5, general_ratio=0.1), Distill(on="general", strength=2.0)],
        general_directory=ROOT / "examples" / "biblioteca" / "general",
    )  # fmt: skip


def site_at(directory: Path, model: Model) -> Site:
    """Only staff write to the game's channel here: how far players are trusted is measured by `bench.poison`."""
    return Site(
        directory, model, trust=Trust(sources={"game": Source(trusted=True)}),
        metrics={"stars": Metric(type="float", low=1, high=5), "thumb": Metric(type="boolean")},
    )  # fmt: skip


def learn(site: Site, number: int, cache: Path) -> tuple[gate.Verdict, dict[str, int], float, float]:
    """One update on what waits, published whatever the gate says: (verdict, rows by role, drift, training seconds)."""
    model, run = site.config.models["npc"], f"npc-{number:04d}"
    place, versions = site.directory / "state" / "runs" / run, site.directory / "state" / "versions"
    if not (place / "request.json").exists():  # else the bench was interrupted, and the trainer has its checkpoint
        place.mkdir(parents=True)
        with transaction(site.database) as connection:
            claims.claim(connection, "npc", run, 100_000)
        cut = experience.cut(site.database, "npc", run, number, update.recipe_of(model), place / "experience.jsonl")
        parent = publish.directory_of(versions, "npc", number - 1) if number > 1 else None
        request = update.request_of(
            model, run_id=run, name="npc", update_number=number, parent=parent, experience_sha256=cut.sha256,
            cache=cache,
        )  # fmt: skip
        write(place / "request.json", request)
    report = chain.train(place)
    manifest = publish.manifest_of(
        report, model="npc", number=number, parent=None, run_id=run, update_number=number,
        experience_sha256=read_request(place).experience_sha256,
    )  # fmt: skip
    publish.publish(place, publish.directory_of(versions, "npc", number), manifest)
    with transaction(site.database) as connection:
        claims.consume(connection, run, number)
    drift = report.evaluation.drift_base if report.evaluation is not None else None
    return gate.judge(report, model.gate), report.examples, drift.mean if drift else 0.0, report.seconds["train"]


def facts(directory: Path, model: Model, cache: Path, seed: int, count: int) -> Path:
    """A library whose version 1 has learned generated lore; kept from an earlier call."""
    if (directory / "learned").exists():
        return directory
    site = site_at(directory, model)
    rows = lore.rows(lore.generate(seed, 1, count)[0], "train")
    site.drop("content/npc/lore.jsonl", [{"raw_prompt": row.prompt, "completion": row.completion} for row in rows], NOW)
    verdict, *_ = learn(site, 1, cache)
    site.database.close()
    print(f"facts: {verdict.outcome}, {verdict.reason}", flush=True)
    (directory / "learned").touch()
    return directory


def accuracy(adapter: Adapter, tested: Sequence[Pair]) -> Accuracy:
    """Of the adapter's present weights."""
    examples = [
        Example(shape="comparison", prompt=(Message("user", asked),), completion=liked, rejected=disliked)
        for asked, liked, disliked in tested
    ]
    items = [
        tokenise(Row(role="eval", update=0, id=0, example=example), place, adapter.tokenizer, 1024)
        for place, example in enumerate(examples)
    ]
    with adapter.without_dropout():
        found = completion_logprobs(adapter, items)
    sums = torch.stack([found[item] for item in items])
    tokens = torch.tensor([[len(each) - item.start for each in (item.tokens, item.rejected or ())] for item in items])
    means = sums.cpu() / tokens
    return Accuracy(
        summed=round(float((sums[:, 0] > sums[:, 1]).float().mean()), 4),
        per_token=round(float((means[:, 0] > means[:, 1]).float().mean()), 4),
    )


def main() -> None:
    """What is asked for and not measured yet; one line of JSON per kind."""
    parser = argparse.ArgumentParser(prog="python -m bench.preference", description="Learning what players prefer.")
    parser.add_argument("--base", type=Path, default=ROOT / ".cache" / "base" / "smollm2-135m")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "preference")
    parser.add_argument("--kinds", nargs="*", default=list(get_args(Kind)), choices=get_args(Kind))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--facts", type=int, default=24, help="facts of update 1 [24]")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of update 2 [64]")
    parser.add_argument("--tested", type=int, default=40, help="pairs of each kind that are tested on [40]")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of update 2 [5e-4]")
    parser.add_argument("--epochs", type=int, default=2, help="of update 2 [2]")
    given = parser.parse_args()
    work, base = given.work.absolute() / f"seed{given.seed}", given.base.absolute()
    started = facts(work / "facts", model_of(base, 1e-3, 5, given.seed), work / "cache", given.seed, given.facts)
    for kind in given.kinds:
        if not (done := work / f"{kind}.json").exists():
            found = measure(started, work / kind, kind, given, base, work / "cache")
            done.write_text(json.dumps(msgspec.to_builtins(found)), "utf-8")
        print(done.read_text("utf-8"), flush=True)


def measure(started: Path, directory: Path, kind: Kind, given: argparse.Namespace, base: Path, cache: Path) -> Learned:
    """One kind of feedback in a copy of the library that knows the facts."""
    if not directory.exists():
        shutil.copytree(started, directory)
    model = model_of(base, given.learning_rate, given.epochs, given.seed)
    site = site_at(directory, model)
    site.batch(kind, records(kind, pairs(given.seed, given.pairs, "trained"), given.seed), NOW + 1)
    verdict, rows, drift, seconds = learn(site, 2, cache)
    site.database.close()
    asked = lore.rows(lore.generate(given.seed, 1, given.facts)[0], "test")
    questions = [TaskRow(row.prompt, row.completion) for row in asked]
    parts: tuple[Part, ...] = ("familiar", "strange")
    tested = {part: pairs(given.seed, given.tested, part) for part in parts}
    torch.set_num_threads(1)
    adapter = load_adapter(base, model.lora)
    known = dict[str, float]()
    with adapter.disabled():
        preference = {part: {"base": accuracy(adapter, found)} for part, found in tested.items()}
    for name, number in (("before", 1), ("after", 2)):
        adapter.load(publish.directory_of(directory / "state" / "versions", "npc", number))
        for part, found in tested.items():
            preference[part][name] = accuracy(adapter, found)
        right = recalled(adapter, questions)
        known[name] = round(sum(right) / len(right), 4)
    return Learned(
        kind=kind, seed=given.seed, pairs=given.tested, examples=rows, preference=preference, facts=known,
        backward_transfer=round(100 * (known["after"] - known["before"]), 1), gate=verdict.outcome,
        reason=verdict.reason, drift=round(drift, 4), train_seconds=round(seconds, 1),
    )  # fmt: skip


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s")
