"""`eternad quarantine`: what was refused, why, and what to do with it."""

from typing import Annotated

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import Failure
from daemon.cli.orders import order

app = typer.Typer(help="Files and lines that were refused: ls, show, retry, drop.", no_args_is_help=True)
Identity = Annotated[int, typer.Argument(metavar="ID", min=1)]


@app.command("ls")
def list_entries(
    model: options.ModelOrAll = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many rows.")] = 50,
) -> None:
    """The latest refusals, newest first."""
    from daemon.state import quarantine, summary

    connection = context.database(context.load(config))
    rows = [row for row in quarantine.rows(connection) if model is None or summary.model_of(row.path) == model][:limit]
    if json:
        return screen.json(rows)
    screen.table(
        ["ID", "PATH", "LINE", "CODE", "SINCE", "REASON"],
        [
            [
                str(row.id), screen.safe(row.path), "" if row.line is None else str(row.line), row.code,
                screen.ago(row.first_seen), screen.safe(row.message),
            ]
            for row in rows
        ],
        "nothing is quarantined",
    )  # fmt: skip


@app.command()
def show(identity: Identity, config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """One refusal with everything that is known, and the bytes that were refused."""
    from daemon.state import quarantine

    row = quarantine.get(context.database(context.load(config)), identity)
    if row is None:
        raise Failure(f"no entry {identity}; see: eternad quarantine ls")
    if json:
        return screen.json(row)
    screen.say(f"{screen.safe(row.path)}" + ("" if row.line is None else f", line {row.line}"))
    screen.say(f"{row.code} (found at: {row.stage}): {screen.safe(row.message)}")
    offset = "" if row.byte_offset is None else f", byte {row.byte_offset}"
    screen.say(f"first seen {screen.clock(row.first_seen)}, tried {row.attempts} times{offset}")
    if row.stored:
        screen.say(f"kept in {screen.safe(row.stored)}")
    if row.excerpt:
        screen.say(screen.safe(row.excerpt[:2000].decode("utf-8", "backslashreplace")))


@app.command()
def retry(
    identity: Annotated[int | None, typer.Argument(metavar="ID", min=1)] = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Read it again, for example after a change of the configuration; without ID: everything that may succeed now."""
    order(config, json, action="retry", quarantine_id=identity)


@app.command()
def drop(identity: Identity, config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """Forget a refusal and delete what was kept of it."""
    order(config, json, action="drop", quarantine_id=identity)
