"""`eternad notify`: whether those who should be told can be, and what has not reached them yet."""

from typing import TYPE_CHECKING

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import BAD_CONFIG, Failure

if TYPE_CHECKING:
    from daemon.config import Config
    from daemon.notify.notices import Notice
    from daemon.notify.outbox import Target

app = typer.Typer(help="Notices: test, ls.", no_args_is_help=True)


@app.command()
def test(config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """Send a notice to everybody, now, without the daemon."""
    import time

    from daemon.notify.notices import Notice

    settings = context.load(config)
    now = time.time()
    notice = Notice(id=f"test-{int(now)}", event="test", at=now, subject="eternad", text="A test of the notices.")
    answers = {target.key: _try(settings, notice, target) for target in _targets(settings)}
    if json:
        screen.json([{"target": key, "error": error} for key, error in answers.items()])
    else:
        screen.table(["TARGET", "ANSWER"], [[key, error or "delivered"] for key, error in answers.items()], "")
    if failed := [key for key, error in answers.items() if error]:
        raise Failure(f"not delivered to {', '.join(failed)}")


def _targets(config: "Config") -> list["Target"]:
    from daemon.notify.outbox import targets

    if not config.notify.is_on:
        raise Failure("nobody is told: set webhook_urls or apprise_file in [notify]", BAD_CONFIG)
    try:
        return targets(config.notify)
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}", BAD_CONFIG) from None


def _try(config: "Config", notice: "Notice", target: "Target") -> str:
    """What went wrong; empty when it was delivered."""
    from daemon.notify.send import NotDelivered, send

    try:
        send(notice, target, config.notify.webhook_secret_file)
    except NotDelivered as error:
        return screen.safe(str(error))
    return ""


@app.command("ls")
def list_waiting(config: options.ConfigOption = None, json: options.JsonOption = False) -> None:
    """What waits in the outbox, oldest first, and why it could not be delivered."""
    from daemon.notify.outbox import waiting

    rows = waiting(context.load(config).state_directory / "outbox")
    if json:
        return screen.json(rows)
    screen.table(
        ["NOTICE", "TARGET", "TRIES", "WHAT", "WENT WRONG"],
        [[row.notice.id, row.target, str(row.attempts), screen.safe(row.notice.text), screen.safe(row.error)]
         for row in rows],
        "everything is delivered",
    )  # fmt: skip
