"""The status page and `/metrics`, on loopback, in a thread of the daemon. Reads; what it is told to do goes through the
same queue as the command line's orders."""

import logging
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from daemon.config import Config
from daemon.control import Commands, Snapshot

if TYPE_CHECKING:
    from daemon.web.server import Server

log = logging.getLogger("eternad.web")
CONNECTIONS_MAX = 64


class Handle:
    """The running server."""

    def __init__(self, server: "Server", thread: threading.Thread, address: str) -> None:
        self._server, self._thread = server, thread
        self.address = address
        """`127.0.0.1:8787`, with the port that was really taken."""

    def close(self) -> None:
        """Stop listening; a request that runs is given a second."""
        self._server.stop()
        self._thread.join(5)


def serve(config: Callable[[], Config], commands: Commands, snapshot: Snapshot) -> Handle | None:
    """Serve the page at `[web] listen`; None where it is switched off or the address cannot be had (which is logged:
    the daemon goes on without its page). `config` gives the configuration of the moment, since it may be reloaded."""
    listen = config().web.listen
    if not listen:
        return None
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        bound = socket.create_server((host.strip("[]"), int(port)), family=family)
    except OSError as error:
        log.error("no status page: [web] listen = %s: %s", listen, error.strerror)
        return None
    # not before it is needed: they are half of the daemon's memory
    import uvicorn

    from daemon.web.app import build
    from daemon.web.server import Server

    server = Server(
        uvicorn.Config(
            build(config, commands, snapshot), log_config=None, log_level="warning", access_log=False,
            server_header=False, date_header=False, lifespan="off", http="h11", loop="asyncio", ws="none",
            limit_concurrency=CONNECTIONS_MAX, timeout_graceful_shutdown=1,
        )
    )  # fmt: skip
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="web", daemon=True)
    thread.start()
    address = f"{host}:{bound.getsockname()[1]}"
    log.info("status page at http://%s/", address)
    return Handle(server, thread, address)
