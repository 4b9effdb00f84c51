"""`eternad gateway`: the front door for players' requests, in the foreground."""

import typer

from daemon.cli import context, options
from daemon.cli.failure import BAD_CONFIG, FAILED, Failure


def gateway(config: options.ConfigOption = None) -> None:
    """The gateway in front of the engines, in the foreground.

    OpenAI's API under the models' names; which version answers is the daemon's to say. Until SIGTERM, which lets
    running requests finish.
    """
    from daemon import log
    from daemon.gateway import server

    loaded = context.load(config)
    if not loaded.gateway.address:
        raise Failure('the configuration has no gateway: add [gateway] with address = "127.0.0.1:8080"', BAD_CONFIG)
    log.configure(name="eternad-gateway")
    try:
        raise typer.Exit(server.run(loaded))
    except OSError as error:
        raise Failure(f"the gateway cannot listen at {loaded.gateway.address}: {error}", FAILED) from None
