"""`backup` and `restore`: the state directory copied beside a running daemon, and brought back."""

import time
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import Failure

Directory = Annotated[Path, typer.Argument(metavar="DIR")]


def backup(directory: Directory, config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """Copy the state to DIR, also while the daemon runs.

    Database, versions, records of runs, quarantine; every file with its hash, checked after writing.
    """
    from daemon import backup as copying

    try:
        made = copying.make(context.load(config).state_directory, directory, time.time())
    except (copying.CannotBackUp, copying.CannotRestore) as error:
        raise Failure(str(error)) from None
    if json:
        return screen.json(made)
    screen.say(f"{len(made.files)} files, {screen.size(made.size)}, are in {directory}; every one was read back")


def restore(
    directory: Directory,
    config: options.ConfigOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Only check the backup.")] = False,
) -> None:
    """Put a backup in the place of the state.

    Checked first, and the state of before is kept aside. Stop the daemon; start it afterwards.
    """
    from daemon import backup as copying

    try:
        if verify:
            found = copying.verify(directory)
            return screen.say(f"{directory} is whole: {len(found.files)} files of {screen.clock(found.created_at)}")
        found, before = copying.restore(directory, context.load(config).state_directory, time.time())
    except copying.CannotRestore as error:
        raise Failure(str(error)) from None
    aside = "" if before is None else f"; the state of before lies in {before}"
    screen.say(f"the state of {screen.clock(found.created_at)} is back{aside}. Restart the engines, then the daemon")
