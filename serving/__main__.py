"""`python -m serving`: the embedded inference engine as a process."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
import uvicorn

from serving.app import build
from serving.engine import Engine, Options

log = logging.getLogger("serving")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("python -m serving", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--adapter-root", type=Path, required=True, help="adapters are loaded from below it only")
    parser.add_argument("--served-name", default="base", help="the base's name in requests")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8400, help="0: any free one, printed at the start")
    parser.add_argument("--uds", type=Path, help="Unix socket instead of host and port")
    parser.add_argument("--slots", type=int, default=3, help="adapters in memory: live, previous and candidate")
    parser.add_argument("--max-rank", type=int, default=16)
    parser.add_argument("--streams", type=int, default=8, help="requests decoded together")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests in the queue before a 429")
    parser.add_argument("--context", type=int, default=2048, help="tokens of prompt and answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--token-file", type=Path, help="file with the bearer token that clients must send")
    parser.add_argument("--alias-file", type=Path, help="where aliases are kept across restarts")
    parser.add_argument("--drain-seconds", type=int, default=30, help="after SIGTERM, for running requests")
    return parser


class Server(uvicorn.Server):
    """uvicorn, except that SIGTERM ends in exit code 0 and systemd learns when it is ready."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signal handlers only set a flag; uvicorn's own would raise the signal again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.should_exit = True
        notify("STOPPING=1")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        notify("READY=1")


def notify(state: str) -> None:
    """Tell the service manager (sd_notify(3)); nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def listen(options: argparse.Namespace) -> socket.socket:
    """The bound socket; a Unix socket is for this user only."""
    if options.uds is None:
        return listen_tcp(options.host, options.port)
    options.uds.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o077)
    try:
        bound.bind(str(options.uds))
    finally:
        os.umask(mask)
    return bound


def listen_tcp(host: str, port: int) -> socket.socket:
    """Says IPPROTO_TCP: asyncio sets TCP_NODELAY only on sockets that do, and answers would wait 40 ms for an ACK."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound


def main() -> None:
    """Load, restore, listen, serve until SIGTERM."""
    options = arguments().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    token = options.token_file.read_text().strip() if options.token_file else None
    torch.set_num_threads(options.threads)
    engine = Engine(Options(**{field: getattr(options, field) for field in Options.__struct_fields__}))
    engine.restore()
    bound = listen(options)
    log.info("serving %s (%s) on %s", options.served_name, engine.model.dtype, bound.getsockname())
    config = uvicorn.Config(
        build(engine, token), log_level="warning", access_log=False, timeout_graceful_shutdown=options.drain_seconds
    )
    Server(config).run(sockets=[bound])


if __name__ == "__main__":
    main()
