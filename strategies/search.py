"""Hyper-parameter search: which settings would have served this model's past best. Optuna proposes, the caller tries.

The study is one append-only file (Optuna's journal). Whoever searches holds `lock`, so at the start every trial that
still counts as running belongs to a search that was killed: it is swept, and its values are tried again. Finished
trials are never lost. Torch-free, and so is Optuna but for `gp`, which imports torch and scipy when it is asked for.
"""

import fcntl
import importlib.util
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from strategies.objective import Score, Weights, is_dominated, weighted
from strategies.space import Parameter, Value, Values

if TYPE_CHECKING:
    import optuna

Sampler = Literal["grid", "random", "tpe", "gp"]
Watch = Callable[[str, float], None]
"""Told (point, loss) as training goes; raises what ends a hopeless trial."""
Try = Callable[[int, Values, Watch], Score]
"""Tries the values of a trial; raises `Unfit` where they cannot be trained."""
INSTALL = "pip install 'eternad[tune]'"
FAR_ABOVE = 0.5
"""Nats per token over the median at the same point at which a trial is hopeless: noise between batches is smaller."""
ENOUGH = 4
"""Other trials that must have reached the point before anything is called hopeless."""


class MissingExtra(Exception):
    """A library of the extra `tune` is not installed; the message names the command."""


class SearchBusy(Exception):
    """Another process searches here."""


class Unfit(Exception):
    """These values cannot be trained (a loss that is not finite, too much memory): bad values, but no broken search."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one proposal."""

    number: int
    state: Literal["finished", "hopeless", "unfit"]
    values: dict[str, Value]
    score: Score | None = None
    value: float | None = None
    """The weighted score."""
    seconds: float = 0.0
    reason: str = ""


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """One search, resumable as long as its directory and space stay the same."""

    directory: Path
    space: list[Parameter]
    start: dict[str, Value]
    """Tried first: what is configured."""
    sampler: Sampler = "tpe"
    pareto: bool = False
    """Gain, rise and drift each for itself, instead of their weighted sum."""
    weights: Weights = Weights()
    seed: int = 0


def require(sampler: Sampler) -> None:
    """Raises `MissingExtra` with the command that helps."""
    needed = ["optuna", *(["scipy", "torch"] if sampler == "gp" else [])]
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        command = INSTALL + (" scipy" if "scipy" in absent else "")  # 37 MiB in every trainer: not part of the extra
        raise MissingExtra(f"a search with `{sampler}` needs {' and '.join(absent)}, not installed here: {command}")


@contextmanager
def opened(search: Search) -> Iterator["optuna.Study"]:
    """The study, alone: created or taken up again. Raises `SearchBusy`, `MissingExtra`."""
    require(search.sampler)
    search.directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(search.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield _study(search)
    except BlockingIOError:
        raise SearchBusy(f"another search is at work in {search.directory}: wait for it or end it") from None
    finally:
        os.close(descriptor)


def _study(search: Search) -> "optuna.Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns of every failed trial with a traceback
    path = search.directory / "study.log"
    _mend(path)
    storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
    study = optuna.create_study(
        study_name="study", storage=storage, load_if_exists=True,
        directions=["maximize", "minimize", "minimize"] if search.pareto else ["maximize"],
    )  # fmt: skip
    study.sampler = _sampler(search, len(study.get_trials(deepcopy=False)))
    _sweep(study)
    if search.start not in _settled(study):
        study.enqueue_trial(search.start)
    return study


def _settled(study: "optuna.Study") -> list[dict[str, Any]]:
    """Values that need not be proposed again: of trials that ended by themselves or wait; not of interrupted ones."""
    return [
        each.params or each.system_attrs.get("fixed_params", {})
        for each in study.get_trials(deepcopy=False)
        if each.state.name == "WAITING" or (each.state.is_finished() and _ended_by_itself(each))
    ]


def _mend(path: Path) -> None:
    """What a kill leaves: the storage's own lock file, and a last line that ends in the middle."""
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)


def _sampler(search: Search, known: int) -> "optuna.samplers.BaseSampler":
    """known: trials of the study so far. A search that goes on with the seed it began with would draw them again."""
    from optuna import samplers

    seed = random.Random(f"{search.seed}/{known}").getrandbits(32) if known else search.seed
    if search.sampler == "gp":
        return samplers.GPSampler(seed=seed)
    if search.sampler == "tpe":
        return samplers.TPESampler(seed=seed)
    return samplers.RandomSampler(seed=seed)  # a grid is proposed point by point: see `propose`


def _sweep(study: "optuna.Study") -> None:
    """Trials of a search that was killed: failed, and tried again (this storage would call them running for ever)."""
    import optuna

    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)


def run(
    search: Search, study: "optuna.Study", attempt: Try, *, trials: int, jobs: int = 1,
    told: Callable[[Trial], None] = lambda _: None,
) -> None:  # fmt: skip
    """Try until `trials` have ended in all, counting those of earlier calls. What `attempt` raises ends the search."""
    left = propose(search, study, trials - len(finished(search, study)))
    if left > 0:
        study.optimize(
            partial(_objective, search, study, attempt), n_trials=left, n_jobs=jobs, catch=(Unfit,),
            callbacks=[lambda _, frozen: told(outcome(search, frozen))],
        )  # fmt: skip


def _objective(
    search: Search, study: "optuna.Study", attempt: Try, trial: "optuna.Trial"
) -> float | tuple[float, float, float]:
    values = proposed(search, trial)
    began = time.monotonic()
    try:
        score = attempt(trial.number, values, partial(compare_loss, study, trial))
    except Unfit as unfit:
        trial.set_user_attr("reason", str(unfit))
        raise
    finally:
        trial.set_user_attr("seconds", round(time.monotonic() - began, 3))
    return worth(search, trial, score)


def proposed(search: Search, trial: "optuna.Trial") -> dict[str, Value]:
    """The values that this trial is to try."""
    values = {each.name: _suggest(trial, each) for each in search.space}
    trial.set_user_attr("values", values)
    return values


def worth(search: Search, trial: "optuna.Trial", score: Score) -> float | tuple[float, float, float]:
    """What the study is told of a score, which is noted."""
    trial.set_user_attr("score", msgspec.to_builtins(score))
    return (score.gain, score.rise, score.drift) if search.pareto else weighted(score, search.weights)


def propose(search: Search, study: "optuna.Study", left: int) -> int:
    """How many trials to run; for a grid, its next points (in an order drawn by the seed) are put in the queue.

    Optuna's own GridSampler stumbles over points that were queued, and a killed trial's values are.
    """
    if search.sampler != "grid":
        return left
    known = _settled(study)
    waiting = sum(each.state.name == "WAITING" for each in study.get_trials(deepcopy=False))
    for point in islice((point for point in grid(search) if point not in known), max(left - waiting, 0)):
        study.enqueue_trial(point)
        waiting += 1
    return min(left, waiting)


def grid(search: Search) -> list[dict[str, Value]]:
    """Every combination of the parameters' grid values, shuffled: half a grid is then a sample of the whole."""
    names = [each.name for each in search.space]
    points = [
        dict(zip(names, point, strict=True))
        for point in product(*([each.legal(value) for value in each.grid] for each in search.space))
    ]
    random.Random(search.seed).shuffle(points)
    return points


def _suggest(trial: "optuna.Trial", parameter: Parameter) -> Value:
    """Three digits: what is tried is what will stand in the configuration."""
    if parameter.kind == "int":
        return trial.suggest_int(parameter.name, round(parameter.low), round(parameter.high), log=parameter.log)
    value = trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log)
    return parameter.legal(float(f"{value:.3g}"))


def compare_loss(study: "optuna.Study", trial: "optuna.Trial", point: str, loss: float) -> None:
    """Raises `optuna.TrialPruned` where the loss at a point is far above that of the other trials there."""
    import optuna

    key = f"loss at {point}"
    trial.set_user_attr(key, loss)
    others = [
        each.user_attrs[key]
        for each in study.get_trials(deepcopy=False)
        if key in each.user_attrs and each.number != trial.number
    ]
    if is_hopeless(loss, others):
        reason = f"loss {loss:.2f} at {point}, the median of {len(others)} others is {median(others):.2f}"
        trial.set_user_attr("reason", reason)
        raise optuna.TrialPruned(reason)


def is_hopeless(loss: float, others: Sequence[float]) -> bool:
    """Whether a training loss (nats per token) is far above that of the other trials at the same point."""
    if len(others) < ENOUGH:
        return False
    return not math.isfinite(loss) or loss > median(others) + FAR_ABOVE


def finished(search: Search, study: "optuna.Study") -> list[Trial]:
    """Every trial that ended by itself, in order; those that were killed are not among them."""
    every = study.get_trials(deepcopy=False)
    return [outcome(search, each) for each in every if each.state.is_finished() and _ended_by_itself(each)]


def _ended_by_itself(frozen: "optuna.trial.FrozenTrial") -> bool:
    return "score" in frozen.user_attrs if frozen.state.name == "COMPLETE" else "reason" in frozen.user_attrs


def outcome(search: Search, frozen: "optuna.trial.FrozenTrial") -> Trial:
    """A trial as people and scripts see it."""
    noted: dict[str, Any] = frozen.user_attrs
    states: dict[str, Literal["finished", "hopeless"]] = {"COMPLETE": "finished", "PRUNED": "hopeless"}
    score = msgspec.convert(noted["score"], Score) if "score" in noted else None
    return Trial(
        number=frozen.number, state=states.get(frozen.state.name, "unfit"), values=noted.get("values", {}), score=score,
        value=None if score is None else weighted(score, search.weights), seconds=noted.get("seconds", 0.0),
        reason=noted.get("reason", ""),
    )  # fmt: skip


def best(trials: Sequence[Trial]) -> Trial | None:
    """The highest weighted score; the earliest of equals, so that nothing is changed for nothing."""
    scored = [trial for trial in trials if trial.value is not None]
    return max(scored, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The Pareto front: no other trial is better in one respect and no worse in the others."""
    scored = [(trial, trial.score) for trial in trials if trial.score is not None]
    scores = [score for _, score in scored]
    return [trial for trial, score in scored if not is_dominated(score, scores)]


def importance(search: Search, study: "optuna.Study") -> dict[str, float]:
    """Share of each parameter in what separates good trials from the rest (PED-ANOVA, arXiv:2304.10255); {} if few."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    if sum(trial.score is not None for trial in finished(search, study)) < 2 * ENOUGH:
        return {}
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: round(share, 4) for name, share in found.items()}
