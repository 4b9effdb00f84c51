"""Feedback over HTTP, for game servers: `POST /v1/feedback/MODEL/SOURCE` on a Unix socket, or on loopback with a token.

A record is acknowledged when it is on disk: appended to `feedback/MODEL/SOURCE/intake-DATE.jsonl` in the drop directory
and fsynced, many requests at a time. From there it is taken in like any other file, exactly once, because its id is its
idempotency key: a producer that got no answer sends the record again. Nothing here touches the database.
"""

import asyncio
import hmac
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from daemon.config import NAME, Config
from daemon.ingest import feedback, ratings, strict_json
from daemon.ingest.problem import Problem
from daemon.trust.metric import Metric

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

    from daemon.web.server import Server

log = logging.getLogger("eternad.intake")
BODY_BYTES_MAX = 4 * 1024 * 1024
LINES_MAX = 1000
WAITING_MAX = 2000
"""Requests that wait for the disk; more are told to come again."""
RETRY_SECONDS = 1


class Accepted(msgspec.Struct, frozen=True):
    """The answer 202: these ids are on disk."""

    ids: list[str]


class Refused(msgspec.Struct, frozen=True):
    """The answer to a request that was refused; nothing of it was kept."""

    code: str
    message: str
    line: int | None = None
    """1-based, in a request of several records."""


class Journal:
    """Appends lines to the files of the day; one fsync serves everybody who waits."""

    def __init__(self, library: Path, clock: Callable[[], float]) -> None:
        self._library, self._clock = library, clock
        self._waiting: list[tuple[str, bytes, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self.fsyncs_total = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more can wait."""
        return len(self._waiting) >= WAITING_MAX

    async def append(self, place: str, data: bytes) -> None:
        """Return when `data` is durable below `feedback/PLACE`; raises `OSError` when it cannot be written."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((place, data, done))
        self._wake.set()
        await done

    async def run(self) -> None:
        """Write what waits, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._waiting = self._waiting, []
            by_place: dict[str, list[tuple[bytes, asyncio.Future[None]]]] = {}
            for place, data, done in batch:
                by_place.setdefault(place, []).append((data, done))
            for place, each in by_place.items():
                await self._write(place, each)

    async def _write(self, place: str, each: list[tuple[bytes, "asyncio.Future[None]"]]) -> None:
        try:
            await asyncio.to_thread(self._write_durably, place, b"".join(data for data, _ in each))
        except OSError as error:
            log.error("%s: %s", place, error)
            for _, done in each:
                if not done.done():
                    done.set_exception(OSError(error.errno, error.strerror))
            return
        for _, done in each:
            if not done.done():  # the client may have gone
                done.set_result(None)

    def _write_durably(self, place: str, data: bytes) -> None:
        directory = self._library / "feedback" / place
        directory.mkdir(parents=True, exist_ok=True)
        name = f"intake-{datetime.fromtimestamp(self._clock(), UTC):%Y-%m-%d}.jsonl"
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(directory / name, flags, 0o640)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data  # a kill tore the line before, which nobody was told to be safe
            _write_all(descriptor, data, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not size:
            _fsync_directory(directory)
        self.fsyncs_total += 1


def _write_all(descriptor: int, data: bytes, size: int) -> None:
    """Everything or nothing: on a full disk the half that fitted is taken back."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build(config: Callable[[], Config], clock: Callable[[], float], token: str | None = None) -> "Starlette":
    """The application; `config` gives the configuration of the moment, `token` is what TCP clients must know."""
    from contextlib import asynccontextmanager

    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    journal = Journal(config().library_directory, clock)

    def answer(status: int, body: Accepted | Refused, headers: dict[str, str] | None = None) -> Response:
        return Response(msgspec.json.encode(body), status, headers, "application/json")

    def turned_away(request: "Request") -> Response | None:
        """The answer to a request whose body is not even read."""
        model, source = request.path_params["model"], request.path_params["source"]
        if not _may_write(request, token):
            return answer(401, Refused("unauthorized", "show the token: `Authorization: Bearer ...`"))
        if model not in config().models or not NAME.fullmatch(source):
            return answer(404, Refused("unknown_model", f"no model `{model}`, or `{source}` is no name of a source"))
        if journal.is_full:
            return answer(429, Refused("busy", "too many requests wait"), {"Retry-After": str(RETRY_SECONDS)})
        if int(request.headers.get("content-length") or 0) > BODY_BYTES_MAX:
            return answer(413, Refused("too_large", f"at most {BODY_BYTES_MAX} bytes a request"))
        return None

    async def post(request: "Request") -> Response:
        away = turned_away(request)
        if away is not None:
            return away
        model, source = request.path_params["model"], request.path_params["source"]
        try:
            ids, data = check(await _body(request), model, config().watch.line_bytes_max, config().metrics)
        except Problem as problem:
            return answer(
                413 if problem.code == "too_large" else 422, Refused(problem.code, problem.message, problem.line)
            )
        try:
            await journal.append(f"{model}/{source}", data)
        except OSError as error:
            message = f"it cannot be written now ({error.strerror}): send it again"
            return answer(503, Refused("not_written", message), {"Retry-After": str(RETRY_SECONDS)})
        return answer(202, Accepted(ids))

    @asynccontextmanager
    async def lifespan(_app: "Starlette"):  # type: ignore[no-untyped-def]
        writer = asyncio.create_task(journal.run())
        yield
        writer.cancel()

    return Starlette(routes=[Route("/v1/feedback/{model}/{source}", post, methods=["POST"])], lifespan=lifespan)


def _may_write(request: "Request", token: str | None) -> bool:
    """A socket has a group, which decides; a port is open to every program of the machine."""
    server = request.scope.get("server")
    if server is not None and server[1] is None:  # (path, None): a Unix socket
        return True
    shown = request.headers.get("authorization", "").removeprefix("Bearer ")
    return token is not None and hmac.compare_digest(shown.encode(), token.encode())


async def _body(request: "Request") -> bytes:
    """The body of a request, however it is sent, up to the limit."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > BODY_BYTES_MAX:
            raise Problem("too_large", f"at most {BODY_BYTES_MAX} bytes a request")
    return b"".join(parts)


def check(
    body: bytes, model: str, line_bytes_max: int, metrics: Mapping[str, Metric]
) -> tuple[list[str], bytes]:  # fmt: skip
    """(ids, lines to write) of a request: one record, or one a line. All are in order or none is taken.

    Raises `Problem` with the line.
    """
    lines = [line for line in body.split(b"\n") if line.strip()]
    if not 0 < len(lines) <= LINES_MAX:
        raise Problem("too_large" if lines else "bad_record", f"1 to {LINES_MAX} records a request, one a line")
    checked = [check_record(line, number, model, line_bytes_max, metrics) for number, line in enumerate(lines, 1)]
    return [identity for identity, _ in checked], b"".join(data + b"\n" for _, data in checked)


def check_record(
    line: bytes, number: int, model: str, line_bytes_max: int, metrics: Mapping[str, Metric]
) -> tuple[str, bytes]:  # fmt: skip
    """(id, canonical line) of one record; raises `Problem` with the line's number."""
    try:
        if len(line) > line_bytes_max:
            raise Problem("line_too_long", f"a record has at most {line_bytes_max} bytes")
        tree, canonical = strict_json.parse_canonical(line)
        record = feedback.read(tree, model)
        feedback.examples_of(record)
        ratings.check(metrics, record)
    except Problem as problem:
        problem.line = number
        raise
    return feedback.identity(record), canonical


class Handle:
    """The running endpoint."""

    def __init__(self, server: "Server", thread: threading.Thread, path: Path | None) -> None:
        self._server, self._thread, self._path = server, thread, path

    def close(self) -> None:
        """Stop listening; requests that run are answered first."""
        self._server.stop()
        self._thread.join(10)
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def serve(config: Callable[[], Config], clock: Callable[[], float]) -> Handle | None:
    """Listen where `[intake]` says, in a thread; None when it says nowhere. Raises `OSError` for a port in use."""
    import uvicorn

    from daemon.gateway.corked import CorkedProtocol
    from daemon.web.server import Server

    settings = config().intake
    bound = [_bind(settings.socket)] if settings.socket is not None else []
    if settings.listen:
        host, _, port = settings.listen.rpartition(":")
        bound.append(socket.create_server((host.strip("[]"), int(port)), family=_family(host)))
    if not bound:
        return None
    token = settings.token_file.read_text("utf-8").strip() or None if settings.token_file is not None else None
    server = Server(
        uvicorn.Config(
            build(config, clock, token), log_config=None, log_level="warning", access_log=False, server_header=False,
            http=CorkedProtocol, loop="uvloop", ws="none", backlog=1024, timeout_graceful_shutdown=5,
        )
    )  # fmt: skip
    thread = threading.Thread(target=server.run, kwargs={"sockets": bound}, name="intake", daemon=True)
    thread.start()
    return Handle(server, thread, settings.socket)


def _bind(path: Path) -> socket.socket:
    """A Unix socket; who may write to it is decided by its group (mode 0660)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.bind(str(path))
    path.chmod(0o660)
    return bound


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if host.startswith("[") else socket.AF_INET
