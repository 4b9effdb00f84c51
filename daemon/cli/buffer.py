"""`eternad buffer`: what a model keeps of the past."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import USAGE, Failure

if TYPE_CHECKING:
    from buffers.inventory import Age
    from buffers.policy import Buffer
    from daemon.config import Config
    from daemon.state.database import Connection

app = typer.Typer(help="The replay buffer: show, export, resize.", no_args_is_help=True)


@app.command()
def show(model: options.ModelArgument, config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """How many examples of each past update are in the buffer, and what the last update lacked of them."""
    loaded = context.load(config)
    settings = loaded.models[context.model_name(loaded, model)].buffer
    _print(context.database(loaded), model, settings, json)


def _print(connection: "Connection", model: str, settings: "Buffer", json: bool) -> None:
    from buffers.inventory import composition

    rows, lacking = composition(connection, model, settings), _shortfall(connection, model)
    if json:
        return screen.json({"model": model, "policy": settings.policy, "size": settings.examples, "updates": rows,
                            "tokens": settings.tokens, "bytes": settings.bytes, "replay": lacking})  # fmt: skip
    screen.say(_summary(model, settings, rows))
    screen.table(
        ["UPDATE", "LEARNED", "HELD", "TOKENS", "SHARE"],
        [_row(row, sum(each.held for each in rows)) for row in rows],
        "nothing was learned yet",
    )
    if lacking is not None and lacking["shortfall"]:
        screen.say("the last update asked for {wanted} replayed examples and got {got}".format(**lacking))


def _summary(model: str, settings: "Buffer", rows: "list[Age]") -> str:
    held, learned = sum(row.held for row in rows), sum(row.learned for row in rows)
    tokens, size = sum(row.tokens for row in rows), sum(row.bytes for row in rows)
    bounds = "".join(
        f", {now} of at most {most} {name}"
        for name, now, most in (("tokens", tokens, settings.tokens), ("bytes", size, settings.bytes))
        if most is not None
    )
    return f"{model}: {held} of at most {settings.examples} examples{bounds} ({settings.policy}), {learned} learned"


def _row(row: "Age", held: int) -> list[str]:
    return [str(row.update), str(row.learned), str(row.held), str(row.tokens), screen.bar(row.held / max(held, 1))]


def _shortfall(connection: "Connection", model: str) -> dict[str, int] | None:
    """What the last update that was cut asked of the buffer; None before there is one."""
    from daemon.state import runs

    cut = next((run.cut for run in runs.recent(connection, model) if run.cut), None)
    if cut is None:
        return None
    wanted, got = cut["replay_wanted"], cut["rows"].get("replay", 0)
    return {"wanted": wanted, "got": got, "shortfall": max(wanted - got, 0)}


Bound = Annotated[int | None, typer.Option(min=0, help="0: no such bound.")]


@app.command()
def resize(
    model: options.ModelArgument,
    examples: Annotated[int | None, typer.Option(min=1)] = None,
    tokens: Bound = None,
    bytes: Bound = None,  # noqa: A002 - the option's name
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Change how much the buffer holds, in the configuration file, and show what it then holds.

    Nothing is copied or lost: a larger buffer later brings the same examples back.
    """
    given = {"examples": examples, "tokens": tokens, "bytes": bytes}
    changes = {f"buffer.{name}": value or None for name, value in given.items() if value is not None}
    if not changes:
        raise Failure("give --examples, --tokens or --bytes", USAGE)
    loaded, path = context.load(config), context.config_path(config)
    context.model_name(loaded, model)
    backup = _write(path, model, changes)
    changed = context.load(config)
    _print(context.database(changed), model, changed.models[model].buffer, json)
    typer.echo(f"{path} changed, the old one is {backup}; {_tell(changed)}", err=True)


def _write(path: Path, model: str, changes: Mapping[str, int | None]) -> Path:
    from daemon.config import change

    return change.replace(path, change.changed(path.read_text("utf-8"), model, changes))


def _tell(config: "Config") -> str:
    """Let a running daemon read it; what came of it, in words."""
    from daemon.control import Order

    if context.live(config) is None:
        return "the daemon reads it when it starts"
    context.send(config, Order(action="reload"))
    return "the daemon has read it"


@app.command()
def export(
    model: options.ModelArgument,
    config: options.ConfigOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of stdout.")] = None,
) -> None:
    """The buffer's examples as JSON lines, with the update and the file that each came from."""
    import msgspec

    from buffers.inventory import held

    loaded = context.load(config)
    settings = loaded.models[context.model_name(loaded, model)].buffer
    encoder = msgspec.json.Encoder()
    rows: Any = (encoder.encode(row) + b"\n" for row in held(context.database(loaded), model, settings))
    if output is None:
        sys.stdout.buffer.writelines(rows)
        return
    with output.open("wb") as file:
        file.writelines(rows)
    screen.say(f"wrote {output}")
