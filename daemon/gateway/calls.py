"""A client's request, read once: what it asks for, who asks, and what the engine gets of it."""

import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from daemon.gateway.answers import Fields, Refusal
from daemon.gateway.table import Target
from daemon.gateway.wire import Headers

NO_FIELDS: Mapping[str, Any] = MappingProxyType({})
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# RFC 9110, 7.6.1: meant for one connection. The others are ours to say: answers must come unpacked, for their `model`.
NOT_FORWARDED = {
    b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"expect", b"host", b"content-length", b"accept-encoding", b"x-request-id",
    b"x-adapter-version",
}  # fmt: skip


class Gone(Exception):
    """The client has closed the connection before its request was complete."""


class _Asked(msgspec.Struct):
    model: str
    user: str | None = None


class Call:
    """One POST to `/v1/completions` or `/v1/chat/completions`."""

    def __init__(self, scope: Scope, body: bytes, request_id: bytes) -> None:
        """Raises `Refusal` (400) for a body that is no request."""
        self.path: bytes = scope["raw_path"]
        self.request_id, self._body = request_id, body
        self._headers: Headers = scope["headers"]
        try:
            asked = msgspec.json.decode(body, type=_Asked)
        except msgspec.DecodeError as error:
            raise Refusal(400, f"the body is no request: {error}") from None
        self.model, self.user = asked.model, asked.user

    def key(self, header: bytes) -> str | None:
        """What the split holds on to: the session's header, else the `user` field."""
        session = header_of(self._headers, header)
        return session.decode("latin-1") if session else self.user

    def body_for(self, target: Target, changes: Mapping[str, Any] = NO_FIELDS) -> bytes:
        """The same request with the engine's name for the version, and with some fields changed."""
        if target.name == self.model and not target.extra and not changes:
            return self._body
        fields = msgspec.json.decode(self._body, type=Fields)
        for key, value in {**changes, **target.extra, "model": target.name}.items():
            fields[key] = msgspec.Raw(msgspec.json.encode(value))
        if changes.get("stream") is False:
            fields.pop("stream_options", None)  # OpenAI refuses it without a stream
        return msgspec.json.encode(fields)

    def headers_for_engine(self, *, with_authorization: bool) -> Headers:
        """The client's, without those that concern only its connection; with our request id."""
        dropped = NOT_FORWARDED if with_authorization else NOT_FORWARDED | {b"authorization"}
        return [*forwarded(self._headers, dropped), (b"x-request-id", self.request_id)]


def forwarded(headers: Headers, dropped: set[bytes] = NOT_FORWARDED) -> Headers:
    """Without those that end here, and those that `Connection` names."""
    named = header_of(headers, b"connection")
    if named and named.lower() not in (b"keep-alive", b"close"):
        dropped = dropped | {word.strip() for word in named.lower().split(b",")}
    return [(key, value) for key, value in headers if key not in dropped]


def header_of(headers: Headers, name: bytes) -> bytes:
    """Its first value, or nothing."""
    return next((value for key, value in headers if key == name), b"")


def request_id_of(headers: Headers) -> bytes:
    """The client's `X-Request-Id` if it can stand in a log, else a new one."""
    given = header_of(headers, b"x-request-id")
    return given if REQUEST_ID.fullmatch(given) else b"req-" + os.urandom(12).hex().encode()


async def read_body(receive: Receive, bytes_max: int) -> bytes:
    """All of it; raises `Refusal` (413) or `Gone`."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part: bytes = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > bytes_max:
            raise Refusal(413, f"a request has {bytes_max} bytes at most", "request_too_large")
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)
