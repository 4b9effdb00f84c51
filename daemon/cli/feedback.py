"""`eternad feedback validate` and `eternad export`: records before they are sent, examples for other tools."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import FAILED, USAGE, Failure

if TYPE_CHECKING:
    from daemon.export import Shape

app = typer.Typer(help="Feedback records: validate.", no_args_is_help=True)
LINE_BYTES_MAX = 1024 * 1024
SHOWN_MAX = 100


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines; `-` for standard input.")],
    model: Annotated[str, typer.Option("--model", help="The model that the records are for.")],
    json: options.JsonOption = False,
) -> None:
    """Check a file of feedback records as the daemon would, without one: each bad line with its reason."""
    from daemon.ingest.problem import Problem
    from daemon.intake import check_record

    good, bad = 0, []
    for number, line in enumerate(_lines(file), 1):
        try:
            check_record(line, number, model, LINE_BYTES_MAX)
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
