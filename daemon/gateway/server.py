"""`eternad gateway`: both doors in one process, until SIGTERM; then what runs is finished first."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import uvicorn
import uvloop
from starlette.types import ASGIApp

from daemon.config import Config, ConfigError
from daemon.gateway import admin
from daemon.gateway.aliases import Aliases
from daemon.gateway.corked import CorkedProtocol
from daemon.gateway.front import Front, Rules
from daemon.gateway.table import FileError, TableFile
from daemon.gateway.traffic import Traffic
from daemon.gateway.upstream import Fleet
from daemon.machine import sd_notify

log = logging.getLogger("eternad.gateway")
STOP_SECONDS = 50
"""What runs may go on for so long after SIGTERM; the unit's TimeoutStopSec is 60."""
KEEP_ALIVE_SECONDS = 75
BACKLOG = 1024


def run(config: Config) -> int:
    """Serve; the exit status. Raises `ConfigError`, and `OSError` when a socket cannot be had."""
    try:
        uvloop.run(serve(config))
    except FileError as error:
        log.error("%s: %s", config.gateway.table_path(config.state_directory), error)
        return 1
    return 0


async def serve(config: Config) -> None:
    """Until SIGTERM or SIGINT. SIGHUP reads the table's file again."""
    settings, state = config.gateway, config.state_directory
    traffic, fleet = Traffic(), Fleet(_tokens(config), settings.connect_seconds, settings.silence_seconds)
    aliases = Aliases(TableFile(settings.table_path(state)))
    rules = _rules(config)
    front = Front(aliases, traffic, fleet, rules)
    inner = Front(aliases, traffic, fleet, msgspec.structs.replace(rules, token=None))
    doors = {
        _server(front): sd_notify.inherited_sockets() or [listen(settings.address)],
        _server(admin.build(aliases, traffic, inner, os.urandom(8).hex())): [bind_unix(settings.admin_path(state))],
    }
    _on_signals(list(doors), aliases)
    for sockets in doors.values():
        log.info("listening at %s", ", ".join(name_of(each) for each in sockets))
    async with asyncio.TaskGroup() as group:
        for server, sockets in doors.items():
            group.create_task(server.serve(sockets))
        while not all(server.started for server in doors):
            await asyncio.sleep(0.01)
        sd_notify.notify(READY=1, STATUS=f"{len(aliases.table.aliases)} aliases")
    fleet.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Two servers share the process: its signals are handled once, below."""
        yield


def _server(app: ASGIApp) -> _Server:
    return _Server(
        uvicorn.Config(
            app, lifespan="off", log_config=None, log_level="warning", access_log=False, http=CorkedProtocol,
            ws="none", loop="asyncio",
            server_header=False, date_header=False, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
    )  # fmt: skip


def _on_signals(servers: list[_Server], aliases: Aliases) -> None:
    loop = asyncio.get_running_loop()
    rereading: set[asyncio.Task[None]] = set()

    def stop() -> None:
        sd_notify.notify(STOPPING=1)
        for server in servers:
            server.should_exit = True

    def reread() -> None:
        task = loop.create_task(_reread(aliases))
        rereading.add(task)
        task.add_done_callback(rereading.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reread)


async def _reread(aliases: Aliases) -> None:
    sd_notify.notify_reloading()
    try:
        await aliases.reread()
        log.info("the table is at generation %d", aliases.table.generation)
    except FileError as error:
        log.error("the table's file cannot be used, the old table stays: %s", error)
    sd_notify.notify(READY=1)


def _rules(config: Config) -> Rules:
    settings = config.gateway
    return Rules(
        sticky_header=settings.sticky_header.lower().encode(), body_bytes_max=settings.body_bytes_max,
        token=settings.token_file.read_text("utf-8").strip() if settings.token_file else None,
    )  # fmt: skip


def _tokens(config: Config) -> dict[str, str]:
    """What the engines want to see, by url."""
    return {
        url.partition("?")[0]: engine.token_file.read_text("utf-8").strip()
        for engine in config.engines.values() if engine.token_file is not None
        for url in engine.urls
    }  # fmt: skip


def name_of(listener: socket.socket) -> str:
    """Its address, as a person writes it."""
    name = listener.getsockname()
    return Path(name).name if isinstance(name, str) else f"{name[0]}:{name[1]}"


def listen(address: str) -> socket.socket:
    """`HOST:PORT` or `unix:/PATH`."""
    if address.startswith("unix:"):
        return bind_unix(Path(address.removeprefix("unix:")))
    parts = urlsplit(f"//{address}")
    if parts.hostname is None or parts.port is None:
        raise ConfigError(f"[gateway] address = `{address}`: give HOST:PORT, e.g. `127.0.0.1:8080`, or unix:/PATH")
    family = socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio: only then TCP_NODELAY
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((parts.hostname, parts.port))
    listener.listen(BACKLOG)
    return listener


def bind_unix(path: Path) -> socket.socket:
    """Listen there, never for a moment with more than mode 0660; a socket that was left over is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _answers(path):
        raise ConfigError(f"{path}: another gateway listens there")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)  # a whole path may be too long for a socket: unix(7)
    mask = os.umask(0o117)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.umask(mask)
        os.close(directory)
    listener.listen(BACKLOG)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return True
    return False
