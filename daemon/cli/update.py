"""`eternad update`: start one by hand, and look on until it is served or has failed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import Failure
from daemon.cli.orders import order

if TYPE_CHECKING:
    from daemon.config import Config
    from daemon.state.database import Connection
    from daemon.state.runs import Run
    from strategies.request import Progress

POLL_SECONDS = 0.2


class Show(Protocol):
    """Tells a person how far a run is."""

    def __call__(self, run: "Run", progress: "Progress | None") -> None: ...


def update(
    model: options.ModelArgument,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is served or has failed (exit code 1).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the update would learn from.")] = False,
) -> None:
    """Learn what waits for MODEL now.

    Whatever its schedule says.
    """
    if dry_run:
        plan = _plan(config, model)
        return screen.json(plan) if json else screen.say(_sentence(plan))
    reply = order(config, json and not wait, action="update", model=model)
    if wait:
        _finish(await_run(context.load(config), str(reply.detail["run"])), json)


def _plan(path: Path | None, model: str) -> dict[str, Any]:
    from buffers.replay_buffer import members
    from daemon.state import runs
    from daemon.state.waiting import waiting as waiting_for
    from daemon.update import recipe_of

    config = context.load(path)
    settings = config.models[context.model_name(config, model)]
    connection, recipe = context.database(config), recipe_of(settings)
    waiting, live = waiting_for(connection, model, config.trust), runs.live_version(connection, model)
    new = min(waiting.train, settings.schedule.examples_max)
    wanted = round(new * recipe.replay_ratio / (1 - recipe.replay_ratio))
    held = len(members(connection, model, recipe.buffer))
    return {
        "model": model, "new": new, "heldout": waiting.heldout, "replay": min(wanted, held), "replay_wanted": wanted,
        "continues_from": None if live is None else live.number,
        "strategies": [type(strategy).__name__.lower() for strategy in settings.strategy],
    }  # fmt: skip


def _sentence(plan: dict[str, Any]) -> str:
    if not plan["new"]:
        return f"nothing waits for {plan['model']}"
    return (
        f"{plan['model']} would learn {plan['new']} new examples and rehearse {plan['replay']} (of"
        f" {plan['replay_wanted']} wanted), tested on {plan['heldout']} held-out ones, from"
        f" version {screen.version(plan['continues_from'])}, with {', '.join(plan['strategies']) or 'no strategy'}"
    )


def await_run(config: "Config", run_id: str) -> "Run":
    """Show a run's progress until it is at an end."""
    from daemon.overview import progress_of
    from daemon.state import runs

    connection = context.database(config)
    with _shown() as show:
        while (run := _run(connection, run_id)).state in runs.ACTIVE:
            show(run, progress_of(config, run_id))
            time.sleep(POLL_SECONDS)
    return run


def _run(connection: "Connection", run_id: str) -> "Run":
    from daemon.state import runs

    try:
        return runs.get(connection, run_id)
    except KeyError:
        raise Failure(f"no run {run_id}; see: eternad history") from None


@contextmanager
def _shown() -> Iterator[Show]:
    if not screen.is_terminal():
        yield _lines()
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(), rich_progress.TaskProgressColumn(),
        rich_progress.TextColumn("{task.fields[numbers]}"),
    )  # fmt: skip
    with rich_progress.Progress(*columns) as display:
        task = display.add_task("", total=None, numbers="")

        def show(run: "Run", progress: "Progress | None") -> None:
            total, done = _share(run, progress)
            display.update(task, description=_phase(run, progress), total=total, completed=done,
                           numbers=_numbers(progress))  # fmt: skip

        yield show


def _share(run: "Run", progress: "Progress | None") -> tuple[int | None, int]:
    """(steps, steps done) for a bar: unknown before the first step, full after the last, also when it was early."""
    steps = progress.steps if progress is not None else 0
    if progress is None or not steps or progress.phase in ("load", "baseline"):
        return None, 0
    return steps, progress.step if run.state == "TRAINING" and progress.phase == "train" else steps


def _lines() -> Show:
    """One line per phase and per tenth of the steps, for a log."""
    said = ""

    def show(run: "Run", progress: "Progress | None") -> None:
        nonlocal said
        tenth = 10 * progress.step // progress.steps if progress is not None and progress.steps else 0
        if (key := f"{_phase(run, progress)}/{tenth}") != said:
            said = key
            screen.say(f"{_phase(run, progress)} {_numbers(progress)}".rstrip())

    return show


def _phase(run: "Run", progress: "Progress | None") -> str:
    phase = f": {progress.phase}" if progress is not None and run.state == "TRAINING" else ""
    return f"{run.id} {run.state}{phase}"


def _numbers(progress: "Progress | None") -> str:
    if progress is None or progress.phase != "train":
        return ""
    loss = "" if progress.loss is None else f"loss {progress.loss:.3f}  "
    speed = "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:.0f} tokens/s  "
    left = "" if progress.eta_seconds is None else f"{screen.duration(progress.eta_seconds)} left"
    return f"step {progress.step}/{progress.steps}  {loss}{speed}{left}".rstrip()


def _finish(run: "Run", json: bool) -> None:
    text = f"{run.id} {run.state}" + (f": {screen.safe(run.reason)}" if run.reason else "")
    if json:
        screen.json(run)
    elif run.state in ("LIVE", "SUPERSEDED"):
        screen.say(f"{text}; version {run.version} of {run.model} is served")
    if run.state not in ("LIVE", "SUPERSEDED"):
        raise Failure(f"{text}; see: eternad show {run.id}")
