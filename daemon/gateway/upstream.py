"""One replica of an engine: HTTP/1.1 over kept connections, on asyncio's streams.

httpx would do it too, at about a millisecond of CPU for each request; the gateway's whole allowance is two.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

from daemon.gateway import wire
from daemon.gateway.wire import BadAnswer, Body, Head, Headers

NO_HEAD = Head(b"HTTP/1.1 100 Continue")
READ_BYTES = 64 * 1024
IDLE_MAX = 64
"""Kept connections to one replica."""
REST_SECONDS = 2.0
"""A replica that did not answer is asked last for so long."""


class UpstreamFailed(Exception):
    """No connection, silence, or an answer that was broken off."""


class Replica:
    """One url."""

    def __init__(self, url: str, token: str | None, connect_seconds: float, silence_seconds: float) -> None:
        self.url, self._connect_seconds, self._silence_seconds = url, connect_seconds, silence_seconds
        self._path = url.removeprefix("unix:") if url.startswith("unix:") else None
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._prefix = b"" if self._path else parts.path.rstrip("/").encode()
        self._authority = b"engine" if self._path else parts.netloc.encode()
        self._token = f"Bearer {token}".encode() if token else None
        self._idle: list[Connection] = []
        self.running = 0
        self._resting_until = 0.0

    @property
    def is_resting(self) -> bool:
        """It has just failed: others come first."""
        return time.monotonic() < self._resting_until

    def rest(self) -> None:
        """Ask others first for a while."""
        self._resting_until = time.monotonic() + REST_SECONDS

    async def send(self, path: bytes, headers: Headers, body: bytes) -> "Exchange":
        """POST, and the head of the answer. Raises `UpstreamFailed`.

        A kept connection may have been closed by the engine in the moment in which it is used again: that is no
        failure of the engine, so a new one is made.
        """
        request = wire.request(self._prefix + path, self._headers(headers, len(body)), body)
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                try:
                    return await self._exchange(connection, request)
                except UpstreamFailed:
                    if connection.has_answered:
                        raise
        return await self._exchange(await self._connect(), request)

    def close(self) -> None:
        """Close what is idle; running exchanges end by themselves."""
        while self._idle:
            self._idle.pop().abort()

    def give_back(self, connection: "Connection") -> None:
        """For the next request, or closed if it cannot serve one."""
        if connection.is_reusable and len(self._idle) < IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.abort()

    def _headers(self, headers: Headers, length: int) -> Headers:
        own = [(b"host", self._authority), (b"content-length", str(length).encode())]
        if self._token is None:
            return own + headers
        return [*own, (b"authorization", self._token), *(each for each in headers if each[0] != b"authorization")]

    async def _exchange(self, connection: "Connection", request: bytes) -> "Exchange":
        self.running += 1
        exchange = Exchange(self, connection)
        try:
            exchange.head = await connection.begin(request)
        except BaseException:
            exchange.abort()
            raise
        return exchange

    async def _connect(self) -> "Connection":
        try:
            async with asyncio.timeout(self._connect_seconds):
                if self._path:
                    streams = await asyncio.open_unix_connection(self._path, limit=wire.HEAD_BYTES_MAX)
                else:
                    streams = await asyncio.open_connection(self._host, self._port, limit=wire.HEAD_BYTES_MAX)
        except (OSError, TimeoutError) as error:
            raise UpstreamFailed(f"{self.url}: no connection ({error!r})") from None
        return Connection(self.url, *streams, self._silence_seconds)


class Connection:
    """A socket and how far the present answer has come."""

    def __init__(
        self, url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence_seconds: float
    ) -> None:
        self._url, self._reader, self._writer, self._silence_seconds = url, reader, writer, silence_seconds
        self._body: Body | None = None
        self._is_kept = False
        self.has_answered = False
        """A whole head of the present answer has come."""

    @property
    def is_usable(self) -> bool:
        """The engine has not closed it, as far as is known."""
        return not self._reader.at_eof() and not self._writer.is_closing()

    async def begin(self, request: bytes) -> Head:
        """Send a whole request; the head of the answer. Raises `UpstreamFailed`."""
        self._body, self.has_answered = None, False
        with self._failing():
            self._writer.write(request)
            await self._writer.drain()
        head = await self._head()
        while head.status < 200:  # 1xx: the answer is still to come
            head = await self._head()
        with self._failing():
            self._body = Body(head)
        self._is_kept = head.keeps_connection
        return head

    async def _head(self) -> Head:
        with self._failing():
            async with asyncio.timeout(self._silence_seconds):
                data = await self._reader.readuntil(b"\r\n\r\n")
            self.has_answered = True
            return Head(data[:-4])

    async def pieces(self) -> bytes:
        """All of the body that is here, at least one byte; nothing at its end. Raises `UpstreamFailed`."""
        assert self._body is not None  # there was a head
        found = b""
        with self._failing():
            while not found and not self._body.is_whole:
                async with asyncio.timeout(self._silence_seconds):
                    data = await self._reader.read(READ_BYTES)
                found = self._body.feed(data)
        return found

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever goes wrong with the socket or the answer is `UpstreamFailed`."""
        try:
            yield
        except TimeoutError:
            raise UpstreamFailed(f"{self._url}: silent for {self._silence_seconds:.0f} s") from None
        except asyncio.IncompleteReadError:
            raise UpstreamFailed(f"{self._url}: closed without an answer") from None
        except (OSError, BadAnswer, asyncio.LimitOverrunError) as error:
            raise UpstreamFailed(f"{self._url}: {error}") from None

    @property
    def is_reusable(self) -> bool:
        """Ready for another request: the answer has come to its end, and nothing after it."""
        body = self._body
        return self._is_kept and body is not None and body.is_whole and body.is_clean and self.is_usable

    def abort(self) -> None:
        """Close it now: an engine that generates notices that nobody listens."""
        self._writer.transport.abort()


class Exchange:
    """One answer on its way in."""

    def __init__(self, replica: Replica, connection: Connection) -> None:
        self._replica, self._connection = replica, connection
        self._is_over = False
        self.head = NO_HEAD
        """Status and headers."""

    @property
    def status(self) -> int:
        """Of the answer."""
        return self.head.status

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; reading stops while the consumer is busy, and so does then the engine."""
        try:
            while pieces := await self._connection.pieces():
                yield pieces
        except BaseException:
            self.abort()
            raise
        self._end(whole=True)

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([chunk async for chunk in self.chunks()])

    def abort(self) -> None:
        """Nobody wants the rest."""
        self._end(whole=False)

    def _end(self, *, whole: bool) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._replica.running -= 1
        if whole:
            self._replica.give_back(self._connection)
        else:
            self._connection.abort()


class Fleet:
    """All replicas that have been asked, and which to ask next."""

    def __init__(self, tokens: dict[str, str], connect_seconds: float, silence_seconds: float) -> None:
        """`tokens`: {url: bearer token}."""
        self._tokens, self._seconds = tokens, (connect_seconds, silence_seconds)
        self._replicas: dict[str, Replica] = {}

    def pick(self, urls: list[str], without: str | None = None) -> Replica:
        """The least busy one that is not resting; `without`: the one that has just failed, unless it is the only."""
        usable = [url for url in urls if url != without] or urls
        return min((self.replica(url) for url in usable), key=lambda each: (each.is_resting, each.running))

    def replica(self, url: str) -> Replica:
        """The one of this url."""
        found = self._replicas.get(url)
        if found is None:
            found = self._replicas[url] = Replica(url, self._tokens.get(url), *self._seconds)
        return found

    def close(self) -> None:
        """Close idle connections."""
        for replica in self._replicas.values():
            replica.close()
