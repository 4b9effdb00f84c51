"""`eternad tune`: search better settings on a model's past, and propose them as a change of the configuration."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import FAILED, USAGE, Failure

if TYPE_CHECKING:
    from daemon.tuning import Comparison, Stage
    from daemon.tuning_report import Result
    from strategies.search import Search, Trial

SAMPLERS = ("grid", "random", "tpe", "gp")


def tune(
    model: options.ModelArgument,
    trials: Annotated[int, typer.Option("--trials", min=1, help="So many in all; a stopped search goes on.")] = 30,
    sampler: Annotated[str, typer.Option("--sampler", help="grid, random, tpe or gp.")] = "tpe",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Trials at a time; each takes the model's threads.")] = 1,
    updates: Annotated[int, typer.Option("--updates", min=2, help="Past updates played again, the last held out.")] = 4,
    pareto: Annotated[bool, typer.Option("--pareto", help="Gain, forgetting and drift each for itself.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Write the change; the old file is kept as .bak.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be searched.")] = False,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Search better settings for MODEL on its own past.

    Every trial is real training; the daemon goes on beside it. The answer is a change of the configuration.
    """
    from daemon import tuning
    from strategies.search import MissingExtra, SearchBusy

    if sampler not in SAMPLERS:
        raise Failure(f"no sampler `{sampler}`; there are: " + ", ".join(SAMPLERS), USAGE)
    loaded = context.load(config)
    name = context.model_name(loaded, model)
    try:
        house = tuning.stage(loaded, name, updates, pareto)
        found = house.search(sampler, pareto)  # type: ignore[arg-type]  # checked above
        if dry_run:
            return _print_space(house, found, json)
        result = _search(house, found, context.config_path(config), trials, jobs, quiet=json)
    except (tuning.CannotTune, MissingExtra, SearchBusy) as error:
        raise Failure(str(error), FAILED) from None
    screen.json(result) if json else _print(result, house.directory)
    if apply:
        _apply(context.config_path(config), result)


def _search(house: "Stage", found: "Search", path: Path, trials: int, jobs: int, *, quiet: bool) -> "Result":
    from functools import partial

    from daemon import tuning
    from strategies import search

    with search.opened(found) as study:
        _listen(house)
        tuning.clear(house)
        told = (lambda _: None) if quiet else _print_trial
        search.run(found, study, partial(tuning.attempt, house), trials=trials, jobs=jobs, told=told)
        ended = search.finished(found, study)
        best = search.best(ended)
        if best is None:
            raise Failure(f"no trial of {len(ended)} could be scored; the reasons: " + _reasons(ended))
        is_new = bool(tuning.changes(house, best.values))
        comparison = tuning.compare(house, found, best) if is_new else None
        return _result(house, found, ended, best, comparison, search.importance(found, study), path)


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
    from daemon import config_change, tuning, tuning_report
    from strategies.search import front

    changes = tuning.changes(house, best.values) if comparison is not None and comparison.is_better else {}
    text = path.read_text("utf-8")
    after = config_change.changed(text, house.name, changes) if changes else text
    result = tuning_report.Result(
        model=house.name, sampler=found.sampler, updates=house.updates, space=found.space, trials=trials,
        best=best.number, front=[trial.number for trial in front(trials)], importance=importance,
        comparison=comparison, changes=changes, difference=config_change.difference(text, after, path.name),
    )  # fmt: skip
    tuning_report.keep(house.directory, result)
    return result


def _print_space(house: "Stage", found: "Search", json: bool) -> None:
    if json:
        return screen.json({"updates": house.updates, "space": found.space, "start": found.start})
    searched, held = ", ".join(map(str, house.searched)), house.updates[-1]
    screen.say(f"{house.name}: {found.sampler} on updates {searched}; update {held} is held out for the comparison")
    rows = [
        [each.name, f"{found.start[each.name]:g}", f"{each.low:g}", f"{each.high:g}", "log" if each.log else "",
         " ".join(f"{value:.3g}" for value in each.grid)]
        for each in found.space
    ]  # fmt: skip
    screen.table(["PARAMETER", "NOW", "LOW", "HIGH", "SCALE", "GRID"], rows, "nothing to search")


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
            f"held-out update {compared.update}: configured {compared.configured_value:+.4f},"
            f" trial {result.best} {compared.tuned_value:+.4f}"
        )
        screen.say(result.difference or "not better there: nothing to change")
    screen.say(f"all of it, with pictures: {directory}")


def _apply(path: Path, result: "Result") -> None:
    from daemon import config_change

    if not result.changes:
        return
    text = config_change.changed(path.read_text("utf-8"), result.model, result.changes)
    backup = config_change.replace(path, text)
    typer.echo(f"{path} changed, the old one is {backup}; `eternad reload` makes the daemon read it", err=True)
