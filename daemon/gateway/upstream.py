"""One replica of an engine: HTTP/1.1 over kept connections, by h11 on asyncio's streams.

httpx would do it too, at about a millisecond of CPU for each request; the gateway's whole allowance is two.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import h11

Headers = list[tuple[bytes, bytes]]
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
        head = h11.Request(method=b"POST", target=self._prefix + path, headers=self._headers(headers, len(body)))
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                try:
                    return await self._exchange(connection, head, body)
                except UpstreamFailed:
                    if connection.has_answered:
                        raise
        return await self._exchange(await self._connect(), head, body)

    def close(self) -> None:
        """Close what is idle; running exchanges end by themselves."""
        while self._idle:
            self._idle.pop().abort()

    def give_back(self, connection: "Connection") -> None:
        """For the next request, or closed if it cannot serve one."""
        if connection.recycled() and len(self._idle) < IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.abort()

    def _headers(self, headers: Headers, length: int) -> Headers:
        own = [(b"host", self._authority), (b"content-length", str(length).encode())]
        if self._token is None:
            return own + headers
        return [*own, (b"authorization", self._token), *(each for each in headers if each[0] != b"authorization")]

    async def _exchange(self, connection: "Connection", head: h11.Request, body: bytes) -> "Exchange":
        self.running += 1
        exchange = Exchange(self, connection)
        try:
            await connection.begin(head, body)
            await exchange.read_head()
        except BaseException:
            exchange.abort()
            raise
        return exchange

    async def _connect(self) -> "Connection":
        try:
            async with asyncio.timeout(self._connect_seconds):
                if self._path:
                    streams = await asyncio.open_unix_connection(self._path)
                else:
                    streams = await asyncio.open_connection(self._host, self._port)
        except (OSError, TimeoutError) as error:
            raise UpstreamFailed(f"{self.url}: no connection ({error!r})") from None
        return Connection(self.url, *streams, self._silence_seconds)


class Connection:
    """A socket and its HTTP state."""

    def __init__(
        self, url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence_seconds: float
    ) -> None:
        self._url, self._reader, self._writer, self._silence_seconds = url, reader, writer, silence_seconds
        self._http = h11.Connection(our_role=h11.CLIENT)
        self.has_answered = False
        """Any byte of the present exchange has come."""
        self._is_whole = False

    @property
    def is_usable(self) -> bool:
        """The engine has not closed it, as far as is known."""
        return not self._reader.at_eof() and not self._writer.is_closing()

    async def begin(self, head: h11.Request, body: bytes) -> None:
        """Send a whole request."""
        self.has_answered = self._is_whole = False
        parts = [self._http.send(head), self._http.send(h11.Data(data=body)), self._http.send(h11.EndOfMessage())]
        try:
            self._writer.write(b"".join(part for part in parts if part))
            await self._writer.drain()
        except OSError as error:
            raise UpstreamFailed(f"{self._url}: {error!r}") from None

    async def event(self) -> Any:
        """The next event of the answer; raises `UpstreamFailed`."""
        while (event := self._next()) is h11.NEED_DATA:
            try:
                async with asyncio.timeout(self._silence_seconds):
                    data = await self._reader.read(READ_BYTES)
            except TimeoutError:
                raise UpstreamFailed(f"{self._url}: silent for {self._silence_seconds:.0f} s") from None
            except OSError as error:
                raise UpstreamFailed(f"{self._url}: {error!r}") from None
            self.has_answered = self.has_answered or bool(data)
            self._http.receive_data(data)
        return event

    def _next(self) -> Any:
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise UpstreamFailed(f"{self._url}: {error}") from None
        if isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise UpstreamFailed(f"{self._url}: closed without an answer")
        return event

    async def pieces(self) -> bytes:
        """All of the body that is here, at least one byte; nothing at its end. Raises `UpstreamFailed`."""
        if self._is_whole:
            return b""
        held: list[bytes] = []
        event = await self.event()
        while isinstance(event, h11.Data):
            held.append(bytes(event.data))
            event = self._next()
        self._is_whole = isinstance(event, h11.EndOfMessage)
        return held[0] if len(held) == 1 else b"".join(held)

    def recycled(self) -> bool:
        """Ready for another request, if the last answer has come to its end."""
        try:
            self._http.start_next_cycle()
        except h11.LocalProtocolError:
            return False
        return self.is_usable

    def abort(self) -> None:
        """Close it now: an engine that generates notices that nobody listens."""
        self._writer.transport.abort()


class Exchange:
    """One answer on its way in."""

    def __init__(self, replica: Replica, connection: Connection) -> None:
        self._replica, self._connection = replica, connection
        self._is_over = False
        self.status = 0
        self.headers: Headers = []

    async def read_head(self) -> None:
        """Status and headers."""
        event = await self._connection.event()
        while isinstance(event, h11.InformationalResponse):
            event = await self._connection.event()
        self.status, self.headers = event.status_code, list(event.headers)

    def header(self, name: bytes) -> bytes:
        """Its value, or nothing."""
        return next((value for key, value in self.headers if key == name), b"")

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
