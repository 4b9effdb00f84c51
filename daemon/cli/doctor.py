"""`doctor`: what is wrong with the state directory, and what to do."""

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import FAILED

_COLOURS = {"good": "green", "note": "yellow", "bad": "red"}


def doctor(config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """Look the state directory over.

    Database, audit log, versions, orphans, disk, permissions. Exit code 1 if anything is bad. Changes nothing.
    """
    from daemon import doctor as examination

    findings = examination.examine(context.load(config))
    if json:
        screen.json({"findings": findings})
    else:
        for finding in findings:
            level = screen.style(f"{finding.level:<4}", _COLOURS[finding.level])
            screen.say(f"{level}  {finding.check:<11}  {screen.safe(finding.text)}")
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(FAILED)
