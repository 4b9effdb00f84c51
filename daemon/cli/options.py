"""Options and arguments that many commands share."""

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli import context


def complete_model(current: typer.Context, incomplete: str) -> list[str]:
    """Model names for the shell's completion; none when the configuration cannot be read."""
    try:
        return [name for name in context.load(current.params.get("config")).models if name.startswith(incomplete)]
    except Exception:  # a completion must never print
        return []


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file. [default: $ETERNAD_CONFIG, ./eternad.toml, /etc/...]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=complete_model)]
ModelOrAll = Annotated[str | None, typer.Argument(metavar="MODEL", autocompletion=complete_model)]
