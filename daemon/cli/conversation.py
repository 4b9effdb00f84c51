"""One question to an engine over the OpenAI chat protocol, with the standard library only."""

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from daemon.cli import screen
from daemon.cli.failure import Failure
from daemon.cli.orders import parse_version
from daemon.config import Engine


class Answer(NamedTuple):
    """What came back: the version by its name in the engine, and the text, in pieces when it was streamed."""

    version: str
    pieces: Iterator[str]


def target(model: str, version: str | None) -> str:
    """The name of a version in an engine: the model's own for the live one, `npc@0003`, `base`."""
    if version is None:
        return model
    number = parse_version(version)
    return f"{model}@{number:04d}" if number else "base"


def connect(engine: Engine) -> http.client.HTTPConnection:
    """A connection to the first replica; it may open only with the first request."""
    if not engine.urls:
        raise Failure(f"an engine of kind {engine.kind} without urls cannot be asked")
    parts = urlsplit(engine.urls[0])
    if parts.scheme != "unix":
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "127.0.0.1", parts.port, timeout=engine.timeout_seconds)
    connection = http.client.HTTPConnection("localhost", timeout=engine.timeout_seconds)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(engine.timeout_seconds)
    try:
        connection.sock.connect(parts.path)
    except OSError as error:
        raise _silent(engine, error) from None
    return connection


def ask(
    connection: http.client.HTTPConnection, engine: Engine, model: str, prompt: str, tokens: int, stream: bool
) -> Answer:
    """Greedy decoding, so that the same version gives the same answer."""
    body = {
        "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0,
        "stream": stream,
    }  # fmt: skip
    response = _post(connection, engine, body)
    version = response.getheader("X-Adapter-Version") or model
    return Answer(version, _events(response) if stream else _whole(response))


def _silent(engine: Engine, error: Exception) -> Failure:
    return Failure(
        f"the engine at {engine.urls[0]} does not answer ({error}); an embedded one is started by: eternad serve"
    )


def _post(connection: http.client.HTTPConnection, engine: Engine, body: dict[str, Any]) -> http.client.HTTPResponse:
    headers = {"Content-Type": "application/json"}
    if engine.token_file is not None:
        headers["Authorization"] = f"Bearer {engine.token_file.read_text('utf-8').strip()}"
    path = urlsplit(engine.urls[0]).path if engine.urls[0].startswith("http") else ""
    try:
        connection.request("POST", path.rstrip("/") + "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise _silent(engine, error) from None
    if response.status != 200:
        raise Failure(f"the engine answered {response.status}: {screen.safe_lines(_reason(response.read(4000)))}")
    return response


def _reason(body: bytes) -> str:
    """The sentence in an error of the OpenAI shape, or whatever else was said."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")


def _whole(response: http.client.HTTPResponse) -> Iterator[str]:
    yield str(json.loads(response.read())["choices"][0]["message"]["content"])


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    """The text of each server-sent event."""
    for line in response:
        data = line.decode("utf-8", "replace").strip().removeprefix("data:").strip()
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise Failure(f"the engine broke off: {screen.safe(str(event['error'].get('message', event['error'])))}")
        for choice in event.get("choices", []):
            yield choice.get("delta", {}).get("content") or ""
