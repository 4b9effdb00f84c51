"""`eternad status`."""

from typing import Annotated

import typer

from daemon.cli import glance, options


def status(
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every second until Ctrl-C.")] = False,
) -> None:
    """The whole pipeline at a glance.

    What is served, what waits and for what, what runs, what went wrong; also while the daemon is down.
    """
    glance.print_status(config, json, watch)
