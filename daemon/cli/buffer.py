"""`eternad buffer`: what a model keeps of the past."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.cli import context, options, screen

app = typer.Typer(help="The replay buffer: show, export.", no_args_is_help=True)


@app.command()
def show(model: options.ModelArgument, config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """How many examples of each past update are in the buffer, out of how many that were learned."""
    loaded = context.load(config)
    settings = loaded.models[context.model_name(loaded, model)].buffer
    from buffers.inventory import composition

    rows = composition(context.database(loaded), model, settings)
    if json:
        return screen.json({"model": model, "policy": settings.policy, "size": settings.examples, "updates": rows})
    held, learned = sum(row.held for row in rows), sum(row.learned for row in rows)
    screen.say(f"{model}: {held} of at most {settings.examples} examples ({settings.policy}), {learned} learned")
    screen.table(
        ["UPDATE", "LEARNED", "HELD", "SHARE"],
        [[str(row.update), str(row.learned), str(row.held), screen.bar(row.held / max(held, 1))] for row in rows],
        "nothing was learned yet",
    )


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
