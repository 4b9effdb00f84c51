"""The gateway's reading of engines' answers gives what h11 reads, however the bytes are cut."""

import random

import h11
import pytest

from daemon.gateway.wire import BadAnswer, Body, Head, request

DRAW = random.Random(7)
TEXT = bytes(DRAW.randrange(256) for _ in range(3000)) + b"\r\n0\r\n\r\n" * 3


def chunked(body: bytes) -> bytes:
    """In chunks of random sizes, with extensions and a trailer."""
    out, at = b"", 0
    while at < len(body):
        size = DRAW.choice([1, 2, 3, 17, 300])
        part = body[at : at + size]
        out += f"{len(part):x}{DRAW.choice(['', ';a=b'])}\r\n".encode() + part + b"\r\n"
        at += size
    return out + b"0\r\n" + DRAW.choice([b"", b"X-Trailer: 1\r\n"]) + b"\r\n"


def by_h11(data: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body as h11 reads them."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    connection.receive_data(b"")
    head = connection.next_event()
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return head.status_code, list(head.headers), body


def by_us(data: bytes, cut: int) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """The same by `wire`, with the body in pieces of so many bytes."""
    start, _, rest = data.partition(b"\r\n\r\n")
    head = Head(start)
    body, found = Body(head), b""
    for at in range(0, len(rest), cut):
        found += body.feed(rest[at : at + cut])
    if not body.is_whole:
        found += body.feed(b"")
    assert body.is_whole
    return head.status, head.headers, found


ANSWERS = {
    "sized": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-A:  b \r\n\r\n" % len(TEXT) + TEXT,
    "empty": b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
    "chunked": b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(TEXT),
    "empty chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "open": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + TEXT,
    "old": b"HTTP/1.0 200 OK\r\n\r\n" + TEXT,
    "bodiless": b"HTTP/1.1 204 No Content\r\n\r\n",
}


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 64, 1000, 1 << 20])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_read_as_h11_reads_them(name: str, cut: int) -> None:
    """Sized, chunked with extensions and trailers, until the end, and none."""
    assert by_us(ANSWERS[name], cut) == by_h11(ANSWERS[name])


@pytest.mark.parametrize("name", ["sized", "chunked"])
def test_an_answer_that_is_cut_off_is_an_error(name: str) -> None:
    """At every place but the end: never taken for a short answer."""
    start, _, rest = ANSWERS[name].partition(b"\r\n\r\n")
    for end in range(0, len(rest) - 1, 97):
        body = Body(Head(start))
        if end:
            body.feed(rest[:end])
        with pytest.raises(BadAnswer, match="closed in the middle"):
            body.feed(b"")


@pytest.mark.parametrize("bad", [b"HTTP/2 200 OK", b"ICY 200 OK", b"HTTP/1.1 2xx", b"", b"HTTP/1.1 200 OK\r\nnocolon"])
def test_what_is_no_head_is_refused(bad: bytes) -> None:
    """With what was read."""
    with pytest.raises(BadAnswer):
        Head(bad)


@pytest.mark.parametrize("bad", [b"zz\r\n", b"-5\r\n", b"0x5\r\n", b"\r\n", b"x" * 2000])
def test_what_is_no_chunk_is_refused(bad: bytes) -> None:
    """Neither waited for nor passed on."""
    body = Body(Head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked"))
    with pytest.raises(BadAnswer):
        body.feed(bad)
    with pytest.raises(BadAnswer, match="content-length"):
        Body(Head(b"HTTP/1.1 200 OK\r\nContent-Length: -1"))


def test_bytes_after_the_end_spoil_the_connection() -> None:
    """They must not become the next request's answer."""
    sized = Body(Head(b"HTTP/1.1 200 OK\r\nContent-Length: 2"))
    parts = Body(Head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked"))
    assert (sized.feed(b"okHTTP/1.1"), parts.feed(b"2\r\nok\r\n0\r\n\r\nHTTP")) == (b"ok", b"ok")
    assert not sized.is_clean and not parts.is_clean and sized.is_whole and parts.is_whole


def test_connections_are_kept_as_the_engine_says() -> None:
    """HTTP/1.1 unless it says close; HTTP/1.0 only if it says so."""
    heads = [b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK\r\nConnection: Close", b"HTTP/1.0 200 OK",
             b"HTTP/1.0 200 OK\r\nConnection: keep-alive"]  # fmt: skip
    assert [Head(each).keeps_connection for each in heads] == [True, False, False, True]


def test_requests_are_written_as_h11_reads_them() -> None:
    """By a server that is strict."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(request(b"/v1/x?a=1", [(b"host", b"e"), (b"content-length", b"2"), (b"x-y", b"z")], b"{}"))
    head, body = server.next_event(), server.next_event()
    assert (head.method, head.target, head.headers[2]) == (b"POST", b"/v1/x?a=1", (b"x-y", b"z"))
    assert body.data == b"{}" and isinstance(server.next_event(), h11.EndOfMessage)
