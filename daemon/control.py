"""The control socket: HTTP over a Unix socket, by which the command line and the status page reach the daemon.

The server's threads change nothing themselves: they put a `Command` into a queue that the daemon's loop drains, and
hand its answer back. Whoever may open the socket (mode 0660) may command; the caller's user id goes into the audit log.
"""

import http.client
import logging
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any, ClassVar, Literal, cast

import msgspec

Action = Literal[
    "scan", "update", "pause", "resume", "rollback", "cancel", "requeue", "reload", "retry", "drop", "gc", "accept",
    "reject", "erase", "canary", "promote",
]  # fmt: skip
log = logging.getLogger("eternad.control")
ANSWER_SECONDS = 60.0
"""The loop is that busy at most (a scan of a large library); afterwards the caller hears that it is queued."""
BODY_BYTES_MAX = 64 * 1024


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the daemon is asked to do: the body of `POST /v1/commands`."""

    action: Action
    model: str | None = None
    """For update and rollback; for pause and resume: None means all models."""
    version: int | None = None
    """For rollback: None is the version before the live one, 0 the base model. For canary and promote: which one."""
    percent: float | None = None
    """For canary: the share of the requests."""
    run_id: str | None = None
    """For cancel and requeue."""
    dry_run: bool = False
    """For gc: only say what would go."""
    quarantine_id: int | None = None
    """For retry and drop; retry with None means everything that can be retried."""
    record_id: str | None = None
    """For accept and reject: a held feedback record of `model`."""
    subject: str | None = None
    """For erase; for accept and reject without a record: everything held of this subject."""
    why: str | None = None
    """For accept and reject without a record: everything held for this reason (`drift`, `probation`, ...)."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a command, in a sentence for a person and in fields for a script."""

    ok: bool
    text: str
    queued: bool = False
    """The daemon has not come to it yet; it will."""
    detail: dict[str, Any] = {}


class Command:
    """One order on its way through the loop. The loop answers it exactly once."""

    def __init__(self, order: Order, actor: str = "eternad") -> None:
        self.order = order
        self.actor = actor
        """Who asked: `uid:1000`, `web`, `SIGHUP`."""
        self.reply: queue.SimpleQueue[Reply] = queue.SimpleQueue()

    def answer(self, text: str, *, ok: bool = True, **detail: Any) -> None:
        """Tell the caller what was done, or with `ok=False` why not; what is told as done is durable."""
        self.reply.put(Reply(ok=ok, text=text, detail=detail))

    def wait(self, seconds: float = ANSWER_SECONDS) -> Reply:
        """The loop's answer; after `seconds` a reply that says `queued`."""
        try:
            return self.reply.get(timeout=seconds)
        except queue.Empty:
            return Reply(ok=True, queued=True, text=f"{self.order.action} is queued: the daemon is busy")


# not SimpleQueue: in CPython 3.11 its timed `get` waits for ever when a signal comes as the time runs out (seen:
# SIGTERM without effect in 2 of 23 stops)
Commands = queue.Queue[Command]
Snapshot = Callable[[], Mapping[str, Any]]
"""What only the running daemon knows, as JSON; called from the server's threads. Keys: `pid`, `started_at`,
`config_path`, `engines` ({model: {"state", "serving", "detail"}}), `counters` ({name: number}), all optional."""


class NotRunning(Exception):
    """Nothing answers at the control socket."""


def socket_path(state_directory: Path) -> Path:
    """Where the daemon listens: `$RUNTIME_DIRECTORY/control.sock` under systemd, else in the state directory."""
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return Path(runtime or state_directory) / "control.sock"


def serve(path: Path, commands: Commands, snapshot: Snapshot, link: Path | None = None) -> "Handle":
    """Listen at `path` in a thread; `link`, in the state directory, becomes a symbolic link by which clients find it.

    The caller holds the daemon's lock: a socket that lies there is left over and is replaced. Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    server = _Server(path, commands, snapshot)
    if link is not None and link != path:
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.5}, name="control", daemon=True)
    thread.start()
    return Handle(server, thread, path)


class Handle:
    """The running server."""

    def __init__(self, server: "_Server", thread: threading.Thread, path: Path) -> None:
        self._server, self._thread, self.path = server, thread, path

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
        self.path.unlink(missing_ok=True)


class _Server(ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: Path, commands: Commands, snapshot: Snapshot) -> None:
        self.commands, self.snapshot = commands, snapshot
        super().__init__(str(path), _Requests, bind_and_activate=False)
        self._bind(path)
        self.server_activate()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """A caller that went away is its own business; anything else is logged, and the server goes on."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            log.exception("a request at the control socket broke")

    def _bind(self, path: Path) -> None:
        """Through a descriptor of the directory, since a socket's whole path must fit into 108 bytes, and never
        for a moment with more than mode 0660."""
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        mask = os.umask(0o117)
        try:
            self.socket.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.umask(mask)
            os.close(directory)


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float] = 90.0

    @property
    def _ours(self) -> _Server:
        return cast(_Server, self.server)

    def address_string(self) -> str:
        return "control socket"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the standard library's
        """The audit log has every command; a line per request would only fill the journal."""

    def do_GET(self) -> None:
        if self.path != "/v1/status":
            return self._send(404, {"error": f"no such page: {self.path}; there is /v1/status"})
        self._send(200, {"at": time.time(), **self._ours.snapshot()})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if self.path != "/v1/commands" or not (length.isascii() and length.isdigit()):
            return self._refuse(400, "POST an order to /v1/commands, with its Content-Length")
        if int(length) > BODY_BYTES_MAX:
            return self._refuse(413, f"an order has {BODY_BYTES_MAX} bytes at most")
        try:
            order = msgspec.json.decode(self.rfile.read(int(length)), type=Order)
        except msgspec.DecodeError as error:
            return self._refuse(400, str(error))
        reply = self._run(order)
        self._send(202 if reply.queued else 200 if reply.ok else 409, reply)

    def _refuse(self, status: int, reason: str) -> None:
        self.close_connection = True  # what follows on this connection may be the rest of a body
        self._send(status, {"error": reason})

    def _run(self, order: Order) -> Reply:
        command = Command(order, actor=f"uid:{_peer_uid(self.connection)}")
        self._ours.commands.put(command)
        return command.wait()

    def _send(self, status: int, value: Any) -> None:
        body = msgspec.json.encode(value)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _peer_uid(connection: socket.socket) -> int:
    """The user at the other end, by the kernel's word: unix(7), SO_PEERCRED."""
    _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            self.sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        finally:
            os.close(directory)


class Client:
    """The caller's side, standard library only, so that the command line starts at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def send(self, order: Order, timeout: float = ANSWER_SECONDS + 5) -> Reply:
        """Hand over an order and wait for the answer; raises `NotRunning`."""
        return msgspec.json.decode(
            self._request("POST", "/v1/commands", msgspec.json.encode(order), timeout), type=Reply
        )

    def status(self, timeout: float = 2.0) -> dict[str, Any]:
        """The daemon's snapshot; raises `NotRunning`."""
        return cast(dict[str, Any], msgspec.json.decode(self._request("GET", "/v1/status", None, timeout)))

    def _request(self, method: str, path: str, body: bytes | None, timeout: float) -> bytes:
        connection = _UnixConnection(self.path, timeout)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            data = response.read()
        except PermissionError:
            raise NotRunning(f"{self.path}: permission denied; join the socket's group, or use sudo") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise NotRunning(f"nothing answers at {self.path} ({reason}); start it with: eternad run") from None
        finally:
            connection.close()
        if response.status in (200, 202, 409):
            return data
        raise NotRunning(f"{self.path} answered {response.status}: {data.decode(errors='replace')}")
