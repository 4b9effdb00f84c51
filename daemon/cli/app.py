"""The command line put together: one module per command or group of commands."""

from typing import Annotated

import typer

from daemon.cli import (
    ask,
    backup,
    bench,
    board,
    buffer,
    context,
    doctor,
    feedback,
    foreground,
    gateway,
    influence,
    notify,
    options,
    orders,
    past,
    plan,
    quarantine,
    review,
    setup,
    show,
    status,
    tune,
    update,
)

app = typer.Typer(
    name="eternad",
    help="Continual-learning update daemon: content and feedback in, gated LoRA adapters out, swapped in service.",
    no_args_is_help=True,
    add_completion=False,  # `eternad completion SHELL` prints the script, and nothing edits a start-up file
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"eternad {version('eternad')}")
        except PackageNotFoundError:  # run from a checkout
            typer.echo("eternad (checkout)")
        raise typer.Exit


@app.callback()
def before(
    config: options.ConfigOption = None,
    _version: Annotated[
        bool, typer.Option("--version", "-V", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """What may stand before the command."""
    context.chosen.clear()
    if config is not None:
        context.chosen["config"] = config


LOOK, ACT, HOUSE = "Look", "Act", "Set up"
for command, panel in (
    (status.status, LOOK), (past.history, LOOK), (show.show, LOOK), (past.versions, LOOK),
    (influence.influence, LOOK), (past.log, LOOK),
    (ask.ask, LOOK), (doctor.doctor, LOOK), (board.tensorboard, LOOK),
    (orders.scan, ACT), (update.update, ACT), (orders.rollback, ACT), (orders.canary, ACT), (orders.promote, ACT),
    (orders.pause, ACT), (orders.resume, ACT),
    (orders.cancel, ACT), (orders.requeue, ACT), (orders.reload, ACT),
    (orders.gc, ACT), (review.erase, ACT), (tune.tune, ACT), (bench.bench, LOOK), (plan.plan, LOOK),
    (foreground.run, HOUSE), (foreground.serve, HOUSE), (gateway.gateway, HOUSE),
    (setup.init, HOUSE), (setup.check_config, HOUSE), (backup.backup, HOUSE), (backup.restore, HOUSE),
    (setup.install_units, HOUSE), (setup.uninstall_units, HOUSE), (setup.completion, HOUSE),
):  # fmt: skip
    app.command(rich_help_panel=panel)(command)
app.command(rich_help_panel=LOOK)(feedback.export)
app.add_typer(feedback.app, name="feedback", rich_help_panel=LOOK)
app.add_typer(quarantine.app, name="quarantine", rich_help_panel=LOOK)
app.add_typer(notify.app, name="notify", rich_help_panel=LOOK)
app.add_typer(review.app, name="review", rich_help_panel=LOOK)
app.add_typer(buffer.app, name="buffer", rich_help_panel=LOOK)
