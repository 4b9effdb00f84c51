"""What the gateway's tests share: engines that only stream their version, and a gateway in a thread or as a process."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
from serving_kit import ROOT, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

WORDS = 5
ASKED = {"model": "npc", "prompt": "Who are you?", "max_tokens": 5}


class Chatter:
    """An engine that answers every name with that name, word by word. Its attributes are its script."""

    def __init__(self, name: str = "a") -> None:
        self.name = name
        self.delay_seconds = 0.0
        self.hold: threading.Event | None = None
        """No answer is begun before it is set."""
        self.says_model: str | None = None
        """The `model` of its answers; None: what was asked for."""
        self.failures: list[int] = []
        self.breaks_after: int | None = None
        self.words = WORDS
        self.word = ""
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.cut_off = 0
        self.sent = 0
        self.app = Starlette(
            routes=[Route(f"/v1/{path}", self.answer, methods=["POST"]) for path in ("completions", "chat/completions")]
        )

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        await self._pause(request)
        if self.failures:
            return JSONResponse({"error": {"message": "scripted"}}, self.failures.pop(0))
        if body.get("stream"):
            return StreamingResponse(self._events(body), media_type="text/event-stream")
        text = " ".join([self.word or body["model"]] * self.words)
        message = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        choice = {"index": 0, "finish_reason": "stop", **message}
        return JSONResponse(
            {
                "id": self.name,
                "object": "x",
                "created": 1,
                "model": self.says_model or body["model"],
                "choices": [choice],
            }
        )

    async def _pause(self, request: Request) -> None:
        while self.hold is not None and not self.hold.is_set():
            await asyncio.sleep(0.1)
        deadline = time.monotonic() + self.delay_seconds
        while time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            if await request.is_disconnected():
                self.cut_off += 1
                return

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        is_whole = False
        try:
            for number in range(self.words):
                if number == self.breaks_after:
                    raise ConnectionAbortedError("scripted")
                yield self._event(body)
                self.sent += 1
                await asyncio.sleep(self.delay_seconds)
            yield b"data: [DONE]\n\n"
            is_whole = True
        finally:
            self.cut_off += not is_whole

    def _event(self, body: dict[str, Any]) -> bytes:
        word = self.word or body["model"]
        part = {"delta": {"content": word + " "}} if "messages" in body else {"text": word + " "}
        event = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": self.says_model or body["model"],
                 "choices": [{"index": 0, "finish_reason": None, **part}]}  # fmt: skip
        return b"data: " + json.dumps(event).encode() + b"\n\n"


class Gateway:
    """`eternad gateway` as a child process."""

    def __init__(self, directory: Path, **settings: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.directory = f"http://127.0.0.1:{self.port}", directory
        self.admin_socket = directory / "state" / "gateway" / "admin.sock"
        self.table_file = directory / "state" / "gateway" / "aliases.json"
        (directory / "base").mkdir(exist_ok=True)
        (directory / "base" / "config.json").write_text("{}")
        extra = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        self.config = directory / "eternad.toml"
        self.config.write_text(
            f'library_directory = "library"\nstate_directory = "state"\n[engines.local]\nurls = ["http://127.0.0.1:1"]\n'
            f'[models.npc]\nbase_path = "base"\nengine = "local"\n'
            f'[gateway]\naddress = "127.0.0.1:{self.port}"\n{extra}\n'
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> None:
        """Start and wait until both doors are open."""
        command = [sys.executable, "-m", "daemon", "gateway", "--config", str(self.config)]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(self.url + "/health", verify=False)  # its sockets are bound before the first one answers
                self.admin("GET", "/health")
                return
            assert self.process.poll() is None, f"the gateway ended with {self.process.returncode}"
            time.sleep(0.05)
        raise TimeoutError(self.url)

    def admin(self, method: str, path: str, body: object = None, seconds: float = 30.0) -> httpx.Response:
        """A request to the admin socket."""
        transport = httpx.HTTPTransport(uds=str(self.admin_socket), verify=False)  # certificates take 30 ms to read
        with httpx.Client(transport=transport, timeout=seconds) as client:
            return client.request(method, f"http://gateway{path}", json=body)

    def put(self, alias: str, *targets: dict[str, Any], **fields: object) -> httpx.Response:
        """Change an alias."""
        return self.admin("PUT", f"/aliases/{alias}", {"targets": targets, **fields})

    def traffic(self, version: str) -> dict[str, Any]:
        """A version's numbers."""
        found: dict[str, Any] = self.admin("GET", "/traffic").json()["versions"].get(version, {})
        return found

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def running(directory: Path, **settings: object) -> Iterator[Gateway]:
    """A gateway that ends with the test."""
    gateway = Gateway(directory, **settings)
    gateway.start()
    try:
        yield gateway
    finally:
        if gateway.process is not None and gateway.process.poll() is None:
            gateway.kill()


@contextlib.contextmanager
def engines(*chatters: Chatter) -> Iterator[list[str]]:
    """Engines in threads; their urls."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(served(each.app)) for each in chatters]


def target(version: str, *urls: str, **fields: object) -> dict[str, Any]:
    """A row of `targets`."""
    return {"version": version, "urls": list(urls), **fields}


def wait(condition: Any, seconds: float = 10.0, what: str = "it") -> None:
    """Until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)
