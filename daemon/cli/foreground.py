"""Commands that become a server: `run` (the daemon) and `serve` (an embedded engine)."""

import os
import sys
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from daemon.cli import context, options
from daemon.cli.failure import BAD_CONFIG, USAGE, Failure

if TYPE_CHECKING:
    from daemon.config import Config, Engine


def run(config: options.ConfigOption = None) -> None:
    """The daemon, in the foreground, until SIGTERM."""
    from daemon import service

    raise typer.Exit(service.run(context.config_path(config)))


def serve(
    engine: Annotated[str | None, typer.Argument(metavar="ENGINE", help="Needed if there are several.")] = None,
    config: options.ConfigOption = None,
    url: Annotated[str | None, typer.Option("--url", help="Which of the engine's urls, if it has several.")] = None,
) -> None:
    """An embedded engine, in the foreground.

    Base, rank, slots and address by the configuration; takes this process's place.
    """
    loaded = context.load(config)
    arguments = arguments_of(loaded, _name(loaded, engine), url)
    os.execv(sys.executable, [sys.executable, "-m", "serving", *arguments])


def _name(config: "Config", engine: str | None) -> str:
    embedded = [name for name, each in config.engines.items() if each.kind == "embedded"]
    if engine is None and len(embedded) == 1:
        return embedded[0]
    if engine in embedded:
        return str(engine)
    said = "name one" if engine is None else f"`{engine}` is no embedded engine of the configuration"
    raise Failure(f"{said}; there are: {', '.join(embedded) or 'none'}", USAGE)


def arguments_of(config: "Config", name: str, url: str | None = None) -> list[str]:
    """The command line of `python -m serving` for an engine: its models decide the base, the rank and the slots."""
    models = {key: model for key, model in config.models.items() if model.engine == name}
    if len(bases := {model.base_path for model in models.values()}) != 1:
        raise Failure(
            f"[engines.{name}] needs models of one base, but has {len(bases)}"
            f" ({', '.join(models) or 'no model uses it'}): give each base an engine of its own",
            BAD_CONFIG,
        )
    engine, state = config.engines[name], config.state_directory
    arguments = ["--base", str(bases.pop()), "--adapter-root", str(state / "versions"), *_listen(engine, name, url)]
    arguments += ["--alias-file", str(state / "engines" / f"{name}.json")]
    arguments += ["--max-rank", str(max(model.lora.rank for model in models.values()))]
    # per model the live version, the one before it, and the candidate
    arguments += ["--slots", str(3 * len(models)), "--threads", str(max(model.threads for model in models.values()))]
    (state / "versions").mkdir(parents=True, exist_ok=True)
    (state / "engines").mkdir(exist_ok=True)
    return arguments + (["--token-file", str(engine.token_file)] if engine.token_file else [])


def _listen(engine: "Engine", name: str, url: str | None) -> list[str]:
    wanted = url or (engine.urls[0] if engine.urls else "")
    if not wanted:
        raise Failure(f"[engines.{name}] has no urls: add urls = ['http://127.0.0.1:8900']", BAD_CONFIG)
    parts = urlsplit(wanted)
    if parts.scheme == "unix":
        return ["--uds", parts.path]
    return ["--host", parts.hostname or "127.0.0.1", "--port", str(parts.port or 8400)]
