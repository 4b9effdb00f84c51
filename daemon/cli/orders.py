"""Commands that the running daemon carries out: `scan`, `pause`, `resume`, `rollback`, `canary`, `cancel`, ..."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import FAILED, Failure

if TYPE_CHECKING:
    from daemon.control import Reply


def order(config: Path | None, json: bool, **fields: Any) -> "Reply":
    """Send it to the daemon and print its answer."""
    from daemon.control import Order

    loaded = context.load(config)
    if fields.get("model") is not None:
        context.model_name(loaded, fields["model"])
    reply = context.send(loaded, Order(**fields))
    screen.json(reply) if json else screen.say(screen.safe_lines(reply.text))
    return reply


def scan(config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """Look through the whole library now."""
    order(config, json, action="scan")


def pause(
    model: options.ModelOrAll = None, config: options.ConfigOption = None, json: options.JsonOption = False
) -> None:
    """Start no update until `resume`.

    Of one model or of all. Ingest goes on, and so does a run that has begun.
    """
    order(config, json, action="pause", model=model)


def resume(
    model: options.ModelOrAll = None, config: options.ConfigOption = None, json: options.JsonOption = False
) -> None:
    """The opposite of `pause`."""
    order(config, json, action="resume", model=model)


def cancel(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """End a run; its examples wait again."""
    order(config, json, action="cancel", run_id=run)


def requeue(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Try the examples of a rejected run again.

    Or of one whose version was rolled back: they wait again, as if they were new.
    """
    order(config, json, action="requeue", run_id=run)


def reload(config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """Read the configuration anew.

    If it is bad the daemon keeps the old one, and this says why.
    """
    order(config, json, action="reload")


def rollback(
    model: options.ModelArgument,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="A number, or `base`.")] = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be served.")] = False,
) -> None:
    """Serve an earlier version again.

    Without VERSION: the parent of the live one; while a version is on trial, that trial ends.
    """
    number = None if version is None else parse_version(version)
    if not dry_run:
        order(config, json, action="rollback", model=model, version=number)
        return
    plan = _plan(config, model, number)
    screen.json(plan) if json else screen.say(_sentence(model, plan))


def canary(
    model: options.ModelArgument,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="A number.")] = None,
    percent: Annotated[float, typer.Option("--percent", help="Share of the requests.")] = 10.0,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Let a version answer a share of the requests.

    Of what is on trial, the share becomes this one, and stays. Else a trial of VERSION begins; without it, of the
    newest that was rolled back. It ends by `promote` or `rollback`, or by itself when the version does badly.
    """
    number = None if version is None else parse_version(version)
    order(config, json, action="canary", model=model, version=number, percent=percent)


def promote(
    model: options.ModelArgument,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="Only if this is on trial.")] = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Let the version on trial answer all requests."""
    number = None if version is None else parse_version(version)
    order(config, json, action="promote", model=model, version=number)


def parse_version(text: str) -> int:
    """`7`, `0007` or `base` (0)."""
    if text == "base":
        return 0
    if text.isascii() and text.isdigit():
        return int(text)
    raise Failure(f"`{text}` is no version: give a number of `eternad versions`, or base", 2)


def _plan(config: Path | None, model: str, number: int | None) -> dict[str, Any]:
    from daemon.state import runs

    loaded = context.load(config)
    connection = context.database(loaded)
    context.model_name(loaded, model)
    live = runs.live_version(connection, model)
    if live is None and number is None:
        raise Failure(f"{model} is served by its base model: there is nothing to roll back to", FAILED)
    target = number if number is not None else (live.parent if live is not None else None) or 0
    known = {version.number: version for version in runs.versions(connection, model)}
    if target and (target not in known or known[target].state in ("removed", "failed")):
        raise Failure(f"{model} has no version {target} to serve; see: eternad versions {model}")
    lineage = set()
    step: int | None = target
    while step:
        lineage.add(step)
        step = known[step].parent
    aside = sorted(each for each, version in known.items() if version.state in ("live", "superseded"))
    return {
        "model": model, "live": None if live is None else live.number, "target": target,
        "forgets": [each for each in aside if each not in lineage],
    }  # fmt: skip


def _sentence(model: str, plan: dict[str, Any]) -> str:
    forgets = ", ".join(str(number) for number in plan["forgets"])
    text = f"{model} would be served by {screen.version(plan['target'])} instead of {screen.version(plan['live'])}"
    return text + (f"; what versions {forgets} taught would be set aside" if forgets else "")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Remove old versions and runs.

    Never what serves, the version before it, or what an engine has loaded. The daemon does this once an hour by itself.
    """
    order(config, json, action="gc", dry_run=dry_run)
