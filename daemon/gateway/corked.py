"""uvicorn's HTTP protocol with fewer system calls: what is written in one turn of the loop leaves in one `send`.

uvicorn writes an answer's head, its body and its end one by one, and each is a system call and a packet of its own.
Requests are read by llhttp (httptools), which takes a tenth of h11's time; unlike h11 it would read a head without end.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES_MAX = 64 * 1024


class CorkedProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    _is_in_head, _head_bytes = True, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn does, behind a transport that collects."""
        super().connection_made(Corked(transport, self.loop))

    def on_message_begin(self) -> None:
        """The parser's word: a request begins."""
        super().on_message_begin()
        self._is_in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """The parser's word: its body follows."""
        self._is_in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """As uvicorn does, but not for a head that does not end."""
        super().data_received(data)
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self.send_400_response("the head of the request is too long")


class Corked(asyncio.Transport):
    """Collects what is written until the loop's turn ends; everything else is the inner transport's."""

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._inner, self._loop = inner, loop
        self._held: list[bytes] = []

    def write(self, data: Any) -> None:
        """Goes out in this turn of the loop; the inner transport's flow control begins then."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(bytes(data))

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held and not self._inner.is_closing():
            self._inner.write(held[0] if len(held) == 1 else b"".join(held))

    def close(self) -> None:
        """After what was written."""
        self._flush()
        self._inner.close()

    def abort(self) -> None:
        """At once."""
        self._held = []
        self._inner.abort()

    def is_closing(self) -> bool:
        """Whether the inner one is."""
        return self._inner.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """The inner one's."""
        return self._inner.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Of the inner one."""
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        """Of the inner one."""
        self._inner.resume_reading()
