"""Commands around the daemon: `init`, `check-config`, units, `completion`, `gc`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import USAGE, Failure


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH")] = Path("eternad.toml"),
    base: Annotated[Path, typer.Option(help="Directory of the base model.")] = Path("base"),
    model: Annotated[str, typer.Option(help="Name of the model.")] = "npc",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a first configuration.

    Every key with its meaning, the defaults commented out.
    """
    from daemon import config
    from daemon.config import explained

    if not config.NAME.fullmatch(model):
        raise Failure(f"the name `{model}` must match {config.NAME.pattern}", USAGE)
    if path.exists() and not force:
        raise Failure(f"{path} exists: give another path, or --force")
    path.write_text(explained.commented(model, base), "utf-8")
    screen.say(f"wrote {path}; next: edit it, then eternad check-config --config {path}")


def check_config(config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """Read the configuration as the daemon would.

    Exit code 78 and one sentence if it cannot be used.
    """
    loaded = context.load(config)
    if json:
        import msgspec

        return screen.json(msgspec.to_builtins(loaded, enc_hook=str))
    screen.say(f"{context.config_path(config)} is good: " + ", ".join(
        f"{name} ({'+'.join(type(each).__name__.lower() for each in model.strategy) or 'naive'} on {model.engine})"
        for name, model in loaded.models.items()
    ))  # fmt: skip


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument()]) -> None:
    """Print the shell's completion script.

    For bash: eval "$(eternad completion bash)".
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # re-exported, not declared

    screen.say(get_completion_script(prog_name="eternad", complete_var="_ETERNAD_COMPLETE", shell=shell))


DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Root = Annotated[Path, typer.Option(help="Install below this directory (an image, a package).")]


def install_units(
    drop_in: Annotated[list[str] | None, typer.Option(help="A drop-in; may be given several times.")] = None,
    prefix: Annotated[Path | None, typer.Option(help="The environment to run. [default: this one]")] = None,
    root: Root = Path("/"),
    dry_run: DryRun = False,
) -> None:
    """Install the systemd units."""
    import sys

    from daemon.machine import units

    try:
        changes = units.install_units(prefix or Path(sys.prefix), root=root, drop_ins=drop_in or (), dry_run=dry_run)
    except units.UnitsError as error:
        raise Failure(str(error)) from None
    for change in changes:
        screen.say(f"{change.action} {change.path}")
    screen.say("next: " + " && ".join(units.NEXT_STEPS))


def uninstall_units(root: Root = Path("/"), dry_run: DryRun = False) -> None:
    """Remove what `install-units` wrote.

    Users, state, configuration and library stay.
    """
    from daemon.machine import units

    try:
        changes = units.uninstall_units(root=root, dry_run=dry_run)
    except units.UnitsError as error:
        raise Failure(str(error)) from None
    for change in changes:
        screen.say(f"{change.action} {change.path}")
    screen.say(f"next: {units.NEXT_STEPS[-1]}")
