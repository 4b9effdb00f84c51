"""HTTP/1.1 as an engine speaks it (RFC 9112), as far as a client needs it. Pure: bytes in, bytes out.

Clients are strangers, so what they send is read by llhttp. Engines are ours: their answers pass through as bytes, and
only what is needed of them is looked at. `tests/test_gateway_wire.py` holds this module to h11's results.
"""

import re
from typing import Literal

Headers = list[tuple[bytes, bytes]]
HEAD_BYTES_MAX = 64 * 1024
CHUNK_LINE_BYTES_MAX = 1024
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;|$)")
BODILESS = {204, 304}


class BadAnswer(Exception):
    """What came is no HTTP/1.1."""


def request(path: bytes, headers: Headers, body: bytes) -> bytes:
    """A whole POST."""
    lines = [b"POST " + path + b" HTTP/1.1", *(key + b": " + value for key, value in headers), b"", body]
    return b"\r\n".join(lines)


class Head:
    """Status line and headers, names in lower case."""

    def __init__(self, data: bytes) -> None:
        """`data`: up to the empty line, without it. Raises `BadAnswer`."""
        status, *lines = data.split(b"\r\n")
        if not status.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")) or not status[9:12].isdigit():
            raise BadAnswer(f"status line {status[:80]!r}")
        self.status = int(status[9:12])
        self.headers = [_header(line) for line in lines]
        self._is_old = status.startswith(b"HTTP/1.0")

    def header(self, name: bytes) -> bytes:
        """Its value, or nothing."""
        return next((value for key, value in self.headers if key == name), b"")

    @property
    def keeps_connection(self) -> bool:
        """Whether another request may follow (RFC 9112, 9.3)."""
        said = self.header(b"connection").lower()
        return said == b"keep-alive" if self._is_old else b"close" not in said


def _header(line: bytes) -> tuple[bytes, bytes]:
    key, colon, value = line.partition(b":")
    if not colon or not key or key != key.strip():
        raise BadAnswer(f"header {line[:80]!r}")
    return key.lower(), value.strip(b" \t")


class Body:
    """What follows a head, by RFC 9112, 6.3."""

    def __init__(self, head: Head) -> None:
        """Raises `BadAnswer`."""
        length = head.header(b"content-length")
        self._held = b""
        self._kind: Literal["sized", "chunked", "open"] = "sized"
        self._left = 0
        """Bytes of the body, or of the present chunk with its CRLF, that have not come."""
        self._is_last = False
        if head.status in BODILESS:
            pass
        elif b"chunked" in head.header(b"transfer-encoding").lower():
            self._kind = "chunked"
        elif length:
            if not length.isdigit():
                raise BadAnswer(f"content-length {length[:80]!r}")
            self._left = int(length)
        else:
            self._kind = "open"
        self.is_whole = self._kind == "sized" and not self._left
        self.is_clean = True
        """Nothing has come after its end."""

    def feed(self, data: bytes) -> bytes:
        """The part of the body that is in it; `b""` as data is the connection's end. Raises `BadAnswer`."""
        if not data and not self.is_whole:
            if self._kind != "open":
                raise BadAnswer("closed in the middle of the answer")
            self.is_whole, self.is_clean = True, False
        if self._kind == "chunked":
            return self._chunks(data)
        if self._kind == "open":
            return data
        passed = data[: self._left]
        self.is_clean = len(data) <= self._left
        self._left -= len(passed)
        self.is_whole = not self._left
        return passed

    def _chunks(self, data: bytes) -> bytes:
        held, passed, at = self._held + data, [], 0
        while not self.is_whole:
            if self._left:
                part = held[at : at + self._left]
                at, self._left = at + len(part), self._left - len(part)
                passed.append(_without_end(part, self._left))
                if self._left:
                    break
            else:
                end = held.find(b"\r\n", at)
                if end < 0:
                    break
                self._line(held[at:end])
                at = end + 2
        self._held = held[at:]
        if len(self._held) > CHUNK_LINE_BYTES_MAX and not self.is_whole:
            raise BadAnswer("a chunk's size line is too long")
        self.is_clean = not (self.is_whole and self._held)
        return passed[0] if len(passed) == 1 else b"".join(passed)

    def _line(self, line: bytes) -> None:
        """A chunk's size; after the last chunk a trailer, and the empty line that ends all."""
        if self._is_last:
            self.is_whole = not line
            return
        found = CHUNK_SIZE.match(line)
        if found is None:
            raise BadAnswer(f"chunk size {line[:80]!r}")
        size = int(found[1], 16)
        self._is_last = size == 0
        self._left = size + 2 if size else 0


def _without_end(part: bytes, left: int) -> bytes:
    """A chunk's bytes without the CRLF after them, of which `left` bytes have not come."""
    return part[: len(part) - max(2 - left, 0)] if left < 2 else part
