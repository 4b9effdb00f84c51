"""`eternad influence`: who shaped a version."""

from typing import Annotated

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import USAGE, Failure


def influence(
    model: options.ModelArgument,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, help="Its number.")],
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many rows.")] = 20,
) -> None:
    """Who shaped a version.

    What it and its ancestors were trained on, by source, subject, collection and shape.
    """
    from daemon.state import influence as state

    loaded = context.load(config)
    try:
        found = state.of_version(context.database(loaded), context.model_name(loaded, model), version, limit)
    except KeyError:
        raise Failure(f"{model} has no version {version}; see: eternad versions {model}", USAGE) from None
    if json:
        return screen.json(found)
    told = f"{found.examples} examples in {len(found.lineage)} versions, {found.here} new in this one"
    screen.say(f"{model}@{version:04d}: {told}")
    screen.table(
        ["BY", "NAME", "EXAMPLES", "SHARE", "NEW HERE"],
        [
            [by, screen.safe(part.name) or "(content)", str(part.examples), f"{part.share:.1%}", str(part.here)]
            for by, parts in found.by.items()
            for part in parts
        ],
        "no example is left: they were erased",
    )
