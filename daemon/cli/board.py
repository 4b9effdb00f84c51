"""`eternad tensorboard`: the runs for people who look at them in TensorBoard."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import Failure


def tensorboard(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the event files go: `--logdir DIR`.")],
    model: options.ModelOrAll = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """Write runs as TensorBoard event files.

    Those that DIR lacks: losses by step, hold-outs, drift and cost by update. Needs no daemon.
    """
    try:
        from daemon.tensorboard import write_runs
    except ImportError as error:
        raise Failure(f"{error.name} is not installed: pip install 'eternad[tensorboard]'") from None

    loaded = context.load(config)
    wanted = None if model is None else context.model_name(loaded, model)
    try:
        written = write_runs(loaded, context.database(loaded), directory, wanted)
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}") from None
    if json:
        return screen.json(written)
    screen.say(f"{len(written)} runs written; look at them with: tensorboard --logdir {directory}")
