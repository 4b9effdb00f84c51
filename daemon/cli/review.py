"""`eternad review` and `eternad erase`: what a person decides about people's data."""

import re
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import USAGE, Failure
from daemon.cli.orders import order

app = typer.Typer(help="Held feedback: ls, subjects, show, accept, reject.", no_args_is_help=True)
Record = Annotated[str, typer.Argument(metavar="RECORD", help="The id of a feedback record.")]
Records = Annotated[str | None, typer.Argument(metavar="RECORD", help="The id of a feedback record.")]
Why = Annotated[str | None, typer.Option("--why", metavar="CODE", help="Only what is held for this reason: `drift`...")]
Subject = Annotated[str | None, typer.Option("--subject", help="Only what this pseudonym gave: h:...")]


@app.command("ls")
def list_records(
    model: options.ModelOrAll = None,
    why: Why = None,
    subject: Subject = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many rows.")] = 50,
) -> None:
    """What is held, oldest first, and why."""
    from daemon.state import records

    rows = records.held(context.database(context.load(config)), model, limit, why, subject)
    if json:
        return screen.json([context.printable(row) for row in rows])
    screen.table(
        ["MODEL", "RECORD", "KIND", "SOURCE", "SUBJECT", "WHY", "HELD BECAUSE"],
        [
            [row.model, row.id, row.kind, *map(screen.safe, (row.source, row.subject, row.code, row.reason))]
            for row in rows
        ],
        "nothing waits for review",
    )


@app.command()
def subjects(
    model: options.ModelOrAll = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many rows.")] = 20,
) -> None:
    """Whose records are held or came to nothing, those with the most first."""
    from daemon.state import records

    rows = records.suspects(context.database(context.load(config)), model, limit)
    if json:
        return screen.json([dict(zip(("model", "subject", "why", "records"), row, strict=True)) for row in rows])
    screen.table(
        ["MODEL", "SUBJECT", "WHY", "RECORDS"],
        [[owner, screen.safe(subject), why, str(number)] for owner, subject, why, number in rows],
        "nobody's records are held",
    )


@app.command()
def show(
    model: options.ModelArgument,
    record: Record,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """One record as it was given."""
    import msgspec

    from daemon.state import records

    row = records.get(context.database(context.load(config)), model, record)
    if row is None:
        raise Failure(f"{model} has no record {record}; see: eternad review ls")
    if json:
        return screen.json(context.printable(row))
    screen.say(f"{row.kind} from {screen.safe(row.source)}, {row.state}" + (f": {row.reason}" if row.reason else ""))
    for line in msgspec.json.format(row.body, indent=2).decode().splitlines():
        screen.say(screen.safe(line))


@app.command()
def accept(
    model: options.ModelArgument,
    record: Records = None,
    why: Why = None,
    subject: Subject = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Learn from what is held: one record, or all that --why and --subject name."""
    _decide("accept", model, record, why, subject, config, json)


@app.command()
def reject(
    model: options.ModelArgument,
    record: Records = None,
    why: Why = None,
    subject: Subject = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Never learn from what is held: one record, or all that --why and --subject name."""
    _decide("reject", model, record, why, subject, config, json)


def _decide(
    action: str, model: str, record: str | None, why: str | None, subject: str | None, config: Path | None, json: bool
) -> None:
    if (record is None) == (why is None and subject is None):
        raise Failure("give either a record, or --why and --subject for all of them; see: eternad review ls", USAGE)
    order(config, json, action=action, model=model, record_id=record, why=why, subject=subject)


def erase(
    subject: Annotated[str, typer.Option("--subject", help="The pseudonym in the records: h:...")],
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase all data of one person.

    Rows, examples, run directories, free pages; a receipt is kept, and the data is refused if it is dropped again.
    """
    if not re.fullmatch(r"h:[\w-]+", subject, re.ASCII):
        raise Failure(f"`{screen.safe(subject)}` is no subject: it looks like h:3f9a...", USAGE)
    if not yes:
        typer.confirm(f"Erase everything that {subject} gave? It cannot be undone", abort=True)
    order(config, json, action="erase", subject=subject)
