"""Answers to clients: errors in OpenAI's shape, and the version in the body where the engine does not say it."""

from typing import Any

import msgspec
from starlette.types import Send

Fields = dict[str, msgspec.Raw]
KINDS = {401: "authentication_error", 404: "not_found_error"}
CODES = {404: "model_not_found", 401: "invalid_api_key", 502: "upstream_failed", 504: "upstream_silent"}


class Refusal(Exception):
    """A request that gets an error of ours, with a status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code or CODES.get(status)

    def body(self) -> bytes:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return msgspec.json.encode(
            {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}
        )  # fmt: skip


async def send_json(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole answer."""
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": own + headers})
    await send({"type": "http.response.body", "body": body})


class _Named(msgspec.Struct):
    model: Any = None


def with_model(body: bytes, version: str) -> bytes:
    """A JSON object whose `model` is the version; the same bytes if it is so already, or if it is no such object."""
    try:
        if msgspec.json.decode(body, type=_Named).model in (None, version):
            return body
        fields = msgspec.json.decode(body, type=Fields)
    except msgspec.DecodeError:
        return body
    fields["model"] = msgspec.Raw(msgspec.json.encode(version))
    return msgspec.json.encode(fields)


class EventStream:
    """Server-sent events on their way through.

    As soon as one event says the version by itself, nothing is looked at any more: the engine names it.
    """

    def __init__(self, version: str) -> None:
        self._version, self._says_it, self._held = version, False, b""

    def feed(self, chunk: bytes) -> bytes:
        """What can be passed on; at most the begun line is held back."""
        if self._says_it:
            return chunk
        *lines, self._held = (self._held + chunk).split(b"\n")
        passed = b"".join(self._line(line) + b"\n" for line in lines)
        return passed + self.rest() if self._says_it else passed

    def rest(self) -> bytes:
        """What is held back."""
        held, self._held = self._held, b""
        return held

    def _line(self, line: bytes) -> bytes:
        payload = line[5:].strip() if line.startswith(b"data:") else b""
        if self._says_it or not payload.startswith(b"{"):
            return line
        named = with_model(payload, self._version)
        if named is payload:
            self._says_it = _model_of(payload) == self._version
            return line
        return b"data: " + named + (b"\r" if line.endswith(b"\r") else b"")


def _model_of(payload: bytes) -> object:
    try:
        return msgspec.json.decode(payload, type=_Named).model
    except msgspec.DecodeError:
        return None
