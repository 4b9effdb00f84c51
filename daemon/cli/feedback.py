"""`eternad feedback` and `eternad export`: records before they are sent, and to and from other tools."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import FAILED, USAGE, Failure

if TYPE_CHECKING:
    from daemon.export import Shape

app = typer.Typer(help="Feedback records: validate, and to and from other tools.", no_args_is_help=True)
LINE_BYTES_MAX = 1024 * 1024
SHOWN_MAX = 100
KEY_BYTES_MIN = 16


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines; `-` for standard input.")],
    model: Annotated[str, typer.Option("--model", help="The model that the records are for.")],
    json: options.JsonOption = False,
    config: options.ConfigOption = None,
) -> None:
    """Check a file of feedback records as the daemon would, without one: each bad line with its reason.

    With a configuration, values are checked against its metrics as well.
    """
    from daemon.ingest.problem import Problem
    from daemon.intake import check_record

    metrics = {} if config is None else context.load(config).metrics
    good, bad = 0, []
    for number, line in enumerate(_lines(file), 1):
        try:
            check_record(line, number, model, LINE_BYTES_MAX, metrics)
            good += 1
        except Problem as problem:
            bad.append({"line": number, "code": problem.code, "message": str(problem)})
    if json:
        screen.json({"good": good, "bad": bad})
    else:
        for row in bad[:SHOWN_MAX]:
            screen.say(screen.safe(f"{file}, line {row['line']}: {row['code']}: {row['message']}"))
        screen.say(f"{good} records are good, {len(bad)} are not")
    if bad:
        raise typer.Exit(FAILED)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines or one JSON array; `-`: standard input.")],
    tool: Annotated[str, typer.Option("--from", help="Whose rows they are: trl, openai, langfuse, ...")],
    model: Annotated[str, typer.Option("--model", help="The model that the records are for.")],
    key: Annotated[
        Path | None, typer.Option("--subject-key", help="File with the key of which pseudonyms are made.")
    ] = None,
    reporter: Annotated[str, typer.Option("--reporter", help="player, staff, heuristic or model.")] = "player",
) -> None:
    """Rows of another tool as feedback records, on standard output.

    Drop them below feedback/MODEL/SOURCE/; the same rows give the same ids again. Rows that give no record are named.
    """
    import msgspec

    from daemon import exchange

    if reporter not in ("player", "staff", "heuristic", "model"):
        raise Failure(f"no reporter `{reporter}`; there are: player, staff, heuristic, model", USAGE)
    frame = exchange.Frame(
        tool=_tool(tool), model=model, reporter=reporter, key=b"" if key is None else _key(key), now=time.time()
    )
    bad = 0
    for found in exchange.records_of(tool, _rows(file), frame):
        why = str(found) if isinstance(found, ValueError) else _trouble(found, model)
        if why:
            bad += 1
            print(screen.safe(f"{file}: {why}"), file=sys.stderr)
        else:
            sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    if bad:
        raise typer.Exit(FAILED)


@app.command("export")
def export_records(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Feedback records, JSON lines; `-`: standard input.")],
    tool: Annotated[str, typer.Option("--to", help="Whose rows: trl, openai, langfuse, tensorzero, ...")],
) -> None:
    """Feedback records as rows of another tool, JSON lines on standard output; the inverse of `feedback import`.

    Records that the tool has no words for are left out and named.
    """
    import msgspec

    from daemon import exchange

    _tool(tool)
    left_out = 0
    for number, record in enumerate(_rows(file), 1):
        try:
            if why := _trouble(record, str(record.get("model")) if isinstance(record, dict) else ""):
                raise exchange.CannotExpress(why)
            for row in exchange.rows_of(tool, record):
                sys.stdout.buffer.write(msgspec.json.encode(row) + b"\n")
        except exchange.CannotExpress as error:
            left_out += 1
            print(screen.safe(f"{file}, record {number}: {error}"), file=sys.stderr)
    if left_out:
        raise typer.Exit(FAILED)


def _tool(name: str) -> str:
    from daemon import exchange

    if name not in exchange.TOOLS:
        raise Failure(f"no tool `{name}`; there are: {', '.join(exchange.TOOLS)}", USAGE)
    return name


def _key(file: Path) -> bytes:
    try:
        key = file.read_bytes().strip()
    except OSError as error:
        raise Failure(f"{file}: {error.strerror}", USAGE) from None
    if len(key) < KEY_BYTES_MIN:
        raise Failure(f"{file}: a key has {KEY_BYTES_MIN} bytes or more; make one with: openssl rand -hex 32", USAGE)
    return key


def _rows(file: Path) -> Iterator[Any]:
    """The rows of a file: one JSON array, or one row a line. Whatever is no JSON ends the command."""
    from daemon.ingest import strict_json
    from daemon.ingest.problem import Problem

    lines = _lines(file)
    try:
        if lines and lines[0].lstrip().startswith(b"["):
            yield from strict_json.parse(b"\n".join(lines))
        else:
            yield from (strict_json.parse(line) for line in lines)
    except Problem as problem:
        raise Failure(f"{file}: {problem.message}", USAGE) from None


def _trouble(record: Any, model: str) -> str:
    """Why the daemon would not take a record in, or an empty string."""
    from daemon.ingest import feedback
    from daemon.ingest.problem import Problem

    try:
        feedback.examples_of(feedback.read(record, model))
    except Problem as problem:
        return f"{problem.code}: {problem.message}"
    return ""


def _lines(file: Path) -> list[bytes]:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise Failure(f"{file}: {error.strerror}", USAGE) from None
    return [line for line in data.split(b"\n") if line.strip()]


def export(
    model: options.ModelArgument,
    shape: Annotated[str, typer.Option("--shape", help="`trl` (SFT, DPO and KTO rows) or `openai`.")] = "trl",
    config: options.ConfigOption = None,
) -> None:
    """Examples as rows for TRL or OpenAI.

    Every example of MODEL that counts, as JSON lines for their fine-tuning.
    """
    import msgspec

    from daemon.export import rows

    if shape not in ("trl", "openai"):
        raise Failure(f"no shape `{shape}`; there are: trl, openai", USAGE)
    loaded = context.load(config)
    wanted: Shape = "openai" if shape == "openai" else "trl"
    for row in rows(context.database(loaded), context.model_name(loaded, model), wanted):
        sys.stdout.buffer.write(msgspec.json.encode(row) + b"\n")
