"""`eternad tune`: search better settings on a model's past, and propose them as a change of the configuration."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import FAILED, USAGE, Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon.config import Config
    from daemon.tuning.outcome import Result
    from daemon.tuning.replays import Comparison, Stage
    from strategies.search import Search, Trial

Trials = Annotated[int | None, typer.Option("--trials", min=1, help="So many in all; a stopped search goes on.")]
Sampler = Annotated[str | None, typer.Option("--sampler", help="grid, random, tpe or gp.")]
Engine = Annotated[str | None, typer.Option("--engine", help="optuna: here; ray: on a Ray cluster.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Trials at a time; each takes the model's threads.")]
Updates = Annotated[int | None, typer.Option("--updates", min=3, help="Past updates played again.")]
HeldOut = Annotated[int | None, typer.Option("--held-out", min=1, help="The last of them, kept for the comparison.")]


def tune(
    model: options.ModelArgument,
    trials: Trials = None,
    sampler: Sampler = None,
    engine: Engine = None,
    jobs: Jobs = None,
    updates: Updates = None,
    held_out: HeldOut = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Gain, forgetting and drift each for itself.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Write the change; the old file is kept as .bak.")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="Write what the latest search proposes; no search.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be searched.")] = False,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Search better settings for MODEL on its own past.

    Every trial is real training; the daemon goes on beside it. The answer is a change of the configuration. What is
    not given is taken from the table [models.MODEL.tuning].
    """
    given = {"trials": trials, "sampler": sampler, "engine": engine, "jobs": jobs, "updates": updates,
             "held_out": held_out}  # fmt: skip
    loaded = context.load(config)
    name = context.model_name(loaded, model)
    path = context.config_path(config)
    if accept:
        return _accept(loaded, name, path)
    result = _answer(_with_rules(loaded, name, given), name, path, pareto=pareto, dry_run=dry_run, json=json)
    if apply and result is not None:
        _apply(path, result)


def _with_rules(loaded: "Config", name: str, given: dict[str, Any]) -> "Config":
    """The configuration as if the model's rules said what was given; raises `Failure` with msgspec's words."""
    import msgspec

    from daemon.tuning.rules import Tuning

    model = loaded.models[name]
    rules = msgspec.structs.asdict(model.tuning) | {key: value for key, value in given.items() if value is not None}
    try:
        tuning = msgspec.convert(rules, Tuning)
    except msgspec.ValidationError as error:
        raise Failure(str(error).replace(" - at `$.", " (option --").replace("`", ")"), USAGE) from None
    models = loaded.models | {name: msgspec.structs.replace(model, tuning=tuning)}
    return msgspec.structs.replace(loaded, models=models)


def _answer(loaded: "Config", name: str, path: Path, *, pareto: bool, dry_run: bool, json: bool) -> "Result | None":
    """The search's result, printed; None for a dry run."""
    from daemon.tuning import replays
    from strategies.ray_cluster import NoCluster
    from strategies.search import MissingExtra, SearchBusy

    try:
        house = replays.stage(loaded, name, pareto)
        found = house.search(pareto)
        if dry_run:
            _print_space(house, found, json)
            return None
        result = _search(house, found, path, quiet=json)
    except (replays.CannotTune, MissingExtra, SearchBusy, NoCluster) as error:
        raise Failure(str(error), FAILED) from None
    screen.json(result) if json else _print(result, house.directory)
    return result


def _search(house: "Stage", found: "Search", path: Path, *, quiet: bool) -> "Result":
    from daemon.tuning import replays
    from strategies import search

    told = (lambda _: None) if quiet else _print_trial
    with search.opened(found) as study:
        replays.clear(house)
        _try(house, found, study, told)
        ended = search.finished(found, study)
        best = search.best(ended)
        if best is None:
            raise Failure(f"no trial of {len(ended)} could be scored; the reasons: " + _reasons(ended))
        is_new = bool(replays.changes(house, best.values))
        comparison = replays.compare(house, found, best) if is_new else None
        return _result(house, found, ended, best, comparison, search.importance(found, study), path)


def _try(house: "Stage", found: "Search", study: Any, told: "Callable[[Trial], None]") -> None:
    """All trials, by the engine that the rules name."""
    from functools import partial

    from daemon.tuning import replays
    from strategies import search

    rules = house.model.tuning
    if rules.engine == "ray":
        return _try_on_ray(house, found, study, told)
    _listen(house)
    search.run(found, study, partial(replays.attempt, house), trials=rules.trials, jobs=rules.jobs, told=told)


def _try_on_ray(house: "Stage", found: "Search", study: Any, told: "Callable[[Trial], None]") -> None:
    from functools import partial

    from daemon.tuning import replays
    from strategies import ray_cluster

    ray_cluster.require()
    from strategies import ray_tune

    rules, begin = house.model.tuning, partial(replays.on_node, replays.travelling(house))
    signal.signal(signal.SIGTERM, lambda *_: house.stopping.set())  # Ray ends its trials in order, then all returns
    signal.signal(signal.SIGINT, lambda *_: house.stopping.set())
    try:
        with ray_cluster.joined():
            ray_tune.run(
                found, study, begin, trials=rules.trials, jobs=rules.jobs, needed=replays.resources(house),
                is_stopping=house.stopping.is_set, told=told,
            )  # fmt: skip
    except ray_tune.Broken as broken:
        raise replays.CannotTune(f"the search on the cluster ended: {broken}") from None
    finally:
        replays.clear(house)
    if house.stopping.is_set():
        raise replays.CannotTune(replays.STOPPED)
    _listen(house)


def _listen(house: "Stage") -> None:
    """SIGTERM and Ctrl-C stop the trainers as well, which are in process groups of their own."""

    def stop(_number: int, _frame: Any) -> None:
        house.stopping.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _reasons(trials: list["Trial"]) -> str:
    return "; ".join(sorted({trial.reason for trial in trials}))


def _result(
    house: "Stage", found: "Search", trials: list["Trial"], best: "Trial", comparison: "Comparison | None",
    importance: dict[str, float], path: Path,
) -> "Result":  # fmt: skip
    from daemon.config import change
    from daemon.tuning import outcome, replays
    from strategies.search import front

    changes = replays.changes(house, best.values) if comparison is not None and comparison.is_better else {}
    text = path.read_text("utf-8")
    after = change.changed(text, house.name, changes) if changes else text
    result = outcome.Result(
        model=house.name, sampler=found.sampler, updates=house.updates, space=found.space, trials=trials,
        best=best.number, front=[trial.number for trial in front(trials)], importance=importance,
        comparison=comparison, changes=changes, difference=change.difference(text, after, path.name),
    )  # fmt: skip
    outcome.keep(house.directory, result)
    return result


def _print_space(house: "Stage", found: "Search", json: bool) -> None:
    if json:
        return screen.json({"updates": house.updates, "space": found.space, "start": found.start})
    searched, held = _list(house.searched), _list(house.updates[-house.held_out :])
    screen.say(f"{house.name}: {found.sampler} on updates {searched}; held out for the comparison: {held}")
    rows = [
        [each.name, f"{found.start[each.name]:g}", f"{each.low:g}", f"{each.high:g}", "log" if each.log else "",
         " ".join(f"{value:.3g}" for value in each.grid)]
        for each in found.space
    ]  # fmt: skip
    screen.table(["PARAMETER", "NOW", "LOW", "HIGH", "SCALE", "GRID"], rows, "nothing to search")


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _print_trial(trial: "Trial") -> None:
    if trial.score is None or trial.value is None:
        return screen.say(screen.safe(f"trial {trial.number}: {trial.state}: {trial.reason}"))
    score = trial.score
    parts = f"gain {score.gain:.3f}, rise {score.rise:.3f}, drift {score.drift:.3f}"
    values = ", ".join(f"{name} {value:.3g}" for name, value in trial.values.items())
    screen.say(f"trial {trial.number}: {trial.value:+.4f} ({parts}) in {trial.seconds:.0f} s: {values}")


def _print(result: "Result", directory: Path) -> None:
    rows = [[name, f"{share:.0%}", screen.bar(share)] for name, share in result.importance.items()]
    screen.table(["PARAMETER", "IMPORTANCE", ""], rows, "too few trials to say what matters")
    if result.comparison is None:
        screen.say(f"the best of {len(result.trials)} trials is what is configured: nothing to change")
    else:
        compared = result.comparison
        screen.say(
            f"held-out updates {_list(compared.updates)}: configured {compared.configured_value:+.4f},"
            f" trial {result.best} {compared.tuned_value:+.4f}"
        )
        screen.say(result.difference or "not better there: nothing to change")
    screen.say(f"all of it, with pictures: {directory}")


def _accept(loaded: "Config", name: str, path: Path) -> None:
    """Write what the latest search proposes, if the configuration does not say it already."""
    from daemon.tuning import outcome

    found = outcome.latest(loaded.state_directory, name)
    if found is None or not outcome.open_changes(loaded.models[name], found):
        raise Failure(f"no search proposes a change for {name}: eternad tune {name}", FAILED)
    screen.say(found.difference)
    _apply(path, found)


def _apply(path: Path, result: "Result") -> None:
    from daemon.config import change

    if not result.changes:
        return
    text = change.changed(path.read_text("utf-8"), result.model, result.changes)
    backup = change.replace(path, text)
    typer.echo(f"{path} changed, the old one is {backup}; `eternad reload` makes the daemon read it", err=True)
