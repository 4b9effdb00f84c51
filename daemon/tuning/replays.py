"""`eternad tune`: settings tried on a model's own past, by real training runs, before the operator takes them over.

A trial plays the latest past updates again, one after other, from a fresh adapter and with its own settings: each cut
out of a copy of the journal, trained by `python -m strategies.train`, and continued by the next, as the daemon does.
The last updates are not searched on: there the best trial is compared with what is configured. Nothing here touches the
daemon's runs and versions; all of it lies in `STATE/tuning/MODEL/FINGERPRINT/`, and a trial's rows go when it ends.
"""

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from buffers import experience, rehearsal
from daemon import update
from daemon.config import Config, Model
from daemon.state.database import Connection, open_read_only
from daemon.update import Finished, Trainer
from strategies import search, space
from strategies.objective import Score, Weights, mean, score_of, weighted
from strategies.request import RunReport, read_progress, write
from strategies.search import Search, Trial, Unfit, Watch
from strategies.space import Parameter, Settings, Value, Values

POLL_SECONDS = 0.1
POINTS = 4
"""Per update, how often a trial's loss is held against that of the others."""
BAD_VALUES = ("non_finite_loss", "non_finite_weights", "out_of_memory", "oom")
"""Failures for which the settings can be the cause."""
STOPPED = "told to stop; the same command goes on where it stood"
SEARCHED_MIN = 2
"""Nothing can be forgotten before the second update: a search on one would reward whatever learns fastest."""


class CannotTune(Exception):
    """There is nothing to search on, or a run failed for a reason that no setting can mend; the message says which."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The held-out updates, learned with the settings as they are and as they would be."""

    updates: list[int]
    values: dict[str, Value]
    configured: Score
    tuned: Score
    configured_value: float
    tuned_value: float

    @property
    def is_better(self) -> bool:
        """Whether the change is worth making."""
        return self.tuned_value > self.configured_value


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What all trials of one search share."""

    name: str
    model: Model
    database: Path
    directory: Path
    cache: Path
    updates: list[int]
    """Past updates in their order."""
    held_out: int
    """So many of the last ones are not searched on."""
    hang_seconds: float
    stopping: threading.Event
    """Set when the search is told to end: every trainer is stopped."""

    @property
    def searched(self) -> list[int]:
        """The updates that trials play."""
        return self.updates[: -self.held_out]

    @property
    def settings(self) -> Settings:
        """As configured."""
        return Settings(lora=self.model.lora, training=self.model.training, strategies=list(self.model.strategy))

    @property
    def parameters(self) -> list[Parameter]:
        """What the search varies."""
        return space.space_of(self.settings)

    def search(self, pareto: bool = False) -> Search:
        """The search as `strategies.search` knows it."""
        gate = self.model.gate
        start = space.values_of(self.settings, [each.name for each in self.parameters])
        weights = Weights(old_max=gate.old_loss_max, drift_max=gate.drift_base_max)
        return Search(
            directory=self.directory, space=self.parameters, start=start, sampler=self.model.tuning.sampler,
            pareto=pareto, seed=self.model.seed, weights=weights,
        )  # fmt: skip


def changes(house: Stage, values: Values) -> dict[str, Value]:
    """What the configuration must say for these values, and says otherwise now."""
    settings = space.with_values(house.settings, values)
    names = [*values, *(["lora.alpha"] if "lora.rank" in values else [])]
    now, wanted = space.values_of(house.settings, names), space.values_of(settings, names)
    return {name: value for name, value in wanted.items() if value != now[name]}


def stage(config: Config, name: str, pareto: bool = False) -> Stage:
    """The latest past updates of a model, as its rules say; raises `CannotTune` where there are too few."""
    model, database = config.models[name], config.state_directory / "eternad.db"
    found = _past(database, name, model.tuning.updates)
    if len(found) <= SEARCHED_MIN:
        raise CannotTune(
            f"{name} has {len(found)} past updates with a hold-out: a search needs {SEARCHED_MIN + 1},"
            f" {SEARCHED_MIN} to try settings on and one to compare them; tune after further updates"
        )
    held_out = min(model.tuning.held_out, len(found) - SEARCHED_MIN)
    mark = hashlib.sha256(msgspec.json.encode(
        [_fingerprint(database, name, found), str(model.base_path), model.lora, model.training, model.strategy,
         model.gate, pareto, held_out]
    )).hexdigest()[:12]  # fmt: skip
    return Stage(
        name=name, model=model, database=database, updates=found, held_out=held_out, hang_seconds=config.hang_seconds,
        directory=config.state_directory / "tuning" / name / mark, cache=config.state_directory / "cache",
        stopping=threading.Event(),
    )  # fmt: skip


def _past(database: Path, name: str, updates: int) -> list[int]:
    try:
        connection = open_read_only(database)
    except FileNotFoundError:
        return []
    try:
        return rehearsal.taught(connection, name, updates)
    finally:
        connection.close()


def _fingerprint(database: Path, name: str, updates: list[int]) -> str:
    connection = open_read_only(database)
    try:
        with rehearsal.rehearsal(connection, name, updates) as copy:
            return rehearsal.fingerprint(copy)
    finally:
        connection.close()


def clear(house: Stage) -> None:
    """End the trainers that a killed search has left, and remove what they wrote. For who holds the search's lock."""
    for request in (house.directory / "work").glob("*/*/request.json"):
        Trainer(request.parent).kill()
    shutil.rmtree(house.directory / "work", ignore_errors=True)


def attempt(house: Stage, number: int, values: Values, watch: Watch) -> Score:
    """One trial: its settings on the searched updates."""
    return mean(play(house, f"trial-{number:04d}", values, house.searched, watch))


def on_node(fields: dict[str, Any]) -> tuple[search.Try, Callable[[], None]]:
    """How a trial is tried on another machine, which sees the same files, and what ends it there. See `travelling`."""
    house = Stage(**fields, stopping=threading.Event())
    return partial(attempt, house), house.stopping.set


def travelling(house: Stage) -> dict[str, Any]:
    """What `on_node` makes the stage of: all of it but the event, which belongs to one process."""
    return {name: value for name, value in msgspec.structs.asdict(house).items() if name != "stopping"}


def resources(house: Stage) -> dict[str, float]:
    """What a trial takes of a cluster's node."""
    model = house.model
    return {"CPU": float(model.threads)} | ({"GPU": 1.0} if model.device == "cuda" else {})


def compare(house: Stage, found: Search, best: Trial) -> Comparison:
    """The held-out updates with both settings; read from disk where it was measured before."""
    path = house.directory / "comparison.json"
    if path.exists():
        known = msgspec.json.decode(path.read_bytes(), type=Comparison)
        if known.values == best.values:
            return known
    configured = mean(play(house, "configured", found.start, house.updates)[-house.held_out :])
    tuned = mean(play(house, "tuned", best.values, house.updates)[-house.held_out :])
    measured = Comparison(
        updates=house.updates[-house.held_out :], values=best.values, configured=configured, tuned=tuned,
        configured_value=weighted(configured, found.weights), tuned_value=weighted(tuned, found.weights),
    )  # fmt: skip
    write(path, measured)
    return measured


def play(
    house: Stage, title: str, values: Values, updates: list[int], watch: Watch = lambda _point, _loss: None
) -> list[Score]:
    """The past with other settings; the score of each update. Raises `Unfit`, `CannotTune`."""
    work = house.directory / "work" / title
    shutil.rmtree(work, ignore_errors=True)
    connection = open_read_only(house.database)
    try:
        with rehearsal.rehearsal(connection, house.name, house.updates) as copy:
            scores, parent = [], None
            for number in updates:
                run_directory = work / f"{number:05d}"
                rehearsal.begin(copy, number, run_directory.name)
                _prepare(house, copy, run_directory, number, parent, values)
                report = _train(house, run_directory, number, watch)
                rehearsal.end(copy, number)
                scores.append(_score(report, number))
                parent = _version(run_directory)
            return scores
    finally:
        connection.close()
        shutil.rmtree(work, ignore_errors=True)


def _prepare(
    house: Stage, copy: Connection, run_directory: Path, number: int, parent: Path | None, values: Values
) -> None:
    run_directory.mkdir(parents=True)
    settings = space.with_values(house.settings, values)
    model = msgspec.structs.replace(
        house.model, lora=settings.lora, training=settings.training, strategy=settings.strategies, canary_prompts=[]
    )
    path = run_directory / "experience.jsonl"
    cut = experience.cut(copy, house.name, run_directory.name, number, update.recipe_of(model), path)
    request = update.request_of(
        model, run_id=run_directory.name, name=house.name, update_number=number, parent=parent,
        experience_sha256=cut.sha256, cache=house.cache,
    )  # fmt: skip
    Trainer(run_directory).prepare(request)


def _train(house: Stage, run_directory: Path, number: int, watch: Watch) -> RunReport:
    trainer = Trainer(run_directory)
    trainer.start()
    try:
        report = _reported(_follow(house, trainer, number, watch), run_directory)
    finally:
        trainer.kill()
    watch(f"{number}:{POINTS}", _last_loss(report))
    return report


def _follow(house: Stage, trainer: Trainer, number: int, watch: Watch) -> Finished:
    """Until the trainer ends; its progress is shown to `watch` as it passes each point."""
    passed = 0
    while (ended := trainer.finished()) is None:
        if house.stopping.is_set():
            raise CannotTune(STOPPED)
        if trainer.hangs(house.hang_seconds):
            raise CannotTune(f"the trainer made no progress for {house.hang_seconds:g} s; see hang_seconds")
        progress = read_progress(trainer.run_directory)
        if progress is not None and progress.loss is not None and progress.steps:
            point = progress.step * POINTS // progress.steps
            if passed < point < POINTS:
                passed = point
                watch(f"{number}:{point}", progress.loss)
        time.sleep(POLL_SECONDS)
    return ended


def _reported(ended: Finished, run_directory: Path) -> RunReport:
    if ended.outcome == "trained" and ended.report is not None:
        return ended.report
    if ended.code in BAD_VALUES:
        raise Unfit(f"{ended.code}: {ended.reason}")
    raise CannotTune(f"a trial could not be trained: {ended.reason or ended.outcome} ({run_directory.name})")


def _last_loss(report: RunReport) -> float:
    """Mean over the last quarter of the steps."""
    losses = [loss for _, loss in report.losses]
    last = losses[-max(len(losses) // POINTS, 1) :]
    return sum(last) / max(len(last), 1)


def _score(report: RunReport, number: int) -> Score:
    score = None if report.evaluation is None else score_of(report.evaluation)
    if score is None:
        raise CannotTune(f"update {number} has nothing held out that can be scored by its loss")
    return score


def _version(run_directory: Path) -> Path:
    """The candidate as a version to continue from: the adapter with the state of its methods inside."""
    version, states = run_directory / "adapter", run_directory / "strategy"
    if states.is_dir():
        states.rename(version / "strategy")
    return version
