"""uvicorn's HTTP protocol with fewer system calls: what is written in one turn of the loop leaves in one `send`.

uvicorn writes an answer's head, its body and its end one by one, and each is a system call and a packet of its own.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class CorkedProtocol(H11Protocol):
    """For `uvicorn.Config(http=...)`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn does, behind a transport that collects."""
        super().connection_made(Corked(transport, self.loop))


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
