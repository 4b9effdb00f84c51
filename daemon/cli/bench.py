"""`eternad bench`: what the strategies keep, measured on a model of the configuration."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import Failure

if TYPE_CHECKING:
    from daemon.config import Model

CONFIGURED = "configured"
"""The name of the model's own strategies among the recipes."""


def bench(
    model: options.ModelArgument,
    strategies: Annotated[
        str, typer.Option("--strategies", help="Names of recipes; `configured`: the model's own.")
    ] = f"naive,{CONFIGURED}",
    tasks: Annotated[Path | None, typer.Option("--tasks", help="Directory of NAME.{train,test}.jsonl.")] = None,
    lore: Annotated[str, typer.Option("--lore", help="TASKS,FACTS of invented lore, without --tasks.")] = "4,40",
    seeds: Annotated[str, typer.Option("--seeds", help="An interval takes three.")] = "0",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page and its plots go.")] = Path("bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Two small tasks: a smoke.")] = False,
    config: options.ConfigOption = None,
) -> None:  # fmt: skip
    """Measure what strategies keep over a sequence of tasks.

    With MODEL's base and settings: a table of ACC, BWT, FWT, forgetting and drift, heat maps and curves. The model
    itself is not touched.
    """
    loaded = context.load(config)
    settings = loaded.models[context.model_name(loaded, model)]
    output.mkdir(parents=True, exist_ok=True)
    given = ["--tasks", str(tasks)] if tasks is not None else ["--lore", lore]
    given += ["--strategies", strategies, "--seeds", seeds, "--title", model, *(["--quick"] if quick else [])]
    # a child: nothing of the daemon may import torch
    command = [sys.executable, "-m", "bench.forgetting", *given, *_of_model(settings, output.absolute())]
    if status := subprocess.run(command, check=False).returncode:
        raise Failure(f"the bench ended with status {status}; what it has measured is kept in {output}")
    screen.say(f"{output}/forgetting-{model}.md")


def _of_model(settings: "Model", output: Path) -> list[str]:
    """What the bench takes from the configuration of a model."""
    from strategies.request import write

    write(output / "recipes.json", {CONFIGURED: settings.strategy})
    general = settings.general_directory or output / "no-general-text"
    fields = {
        "base": settings.base_path, "general": general, "work": output / "cells", "docs": output,
        "recipes": output / "recipes.json", "rank": settings.lora.rank, "threads": settings.threads,
        "learning-rate": settings.training.learning_rate, "buffer": settings.buffer.examples,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in fields.items()]
