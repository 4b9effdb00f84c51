"""What the gateway adds to a request: the same engine asked directly and through the gateway, in alternating blocks.

    python -m bench.gateway                      # 8 clients, an engine that thinks for 20 ms
    python -m bench.gateway --clients 1 --think-ms 0
    python -m bench.gateway --unix               # by Unix sockets instead of TCP

Engine and gateway are processes of their own; this one only measures, with the gateway's own HTTP client. Blocks
alternate, so that whatever else the machine does falls on both alike.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from starlette.types import Receive, Scope, Send

from daemon.gateway.upstream import Replica, UpstreamFailed

ROOT = Path(__file__).resolve().parent.parent
THINK_SECONDS = float(os.environ.get("THINK_MS", "20")) / 1e3
EVENTS = 16
ANSWER = json.dumps({"id": "1", "model": "npc@0001", "choices": [{"index": 0, "text": "word " * 50}]}).encode()
EVENT = b"data: " + json.dumps({"id": "1", "model": "npc@0001", "choices": [{"text": "word "}]}).encode() + b"\n\n"
TABLE = {"format": "eternad.gateway/1", "generation": 1}


async def engine(scope: Scope, receive: Receive, send: Send) -> None:
    """As little of an engine as possible: thinks, then answers whole or in events, half as long apart.

    No two thoughts take equally long (0.5 to 1.5 times): clients in lockstep would only measure their own queue.
    """
    body = b""
    while scope["type"] == "http":
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await asyncio.sleep(THINK_SECONDS * random.uniform(0.5, 1.5))
    is_stream = b'"stream":true' in body
    kind = b"text/event-stream" if is_stream else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    for _ in range(EVENTS if is_stream else 0):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await asyncio.sleep(THINK_SECONDS / 2 * random.uniform(0.5, 1.5))
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if is_stream else ANSWER})


def start(*command: str, think_ms: float = 0.0) -> subprocess.Popen[bytes]:
    """A child of this bench."""
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, "THINK_MS": str(think_ms)})


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def address(directory: Path, name: str, *, is_unix: bool) -> str:
    """A url for a server of this bench."""
    return f"unix:{directory / name}" if is_unix else f"http://127.0.0.1:{free_port()}"


def configure(directory: Path, gateway_url: str, engine_url: str) -> Path:
    """A configuration and a table with one alias."""
    (directory / "base").mkdir()
    (directory / "base" / "config.json").write_text("{}")
    (directory / "state" / "gateway").mkdir(parents=True)
    route = {"targets": [{"version": "npc@0001", "urls": [engine_url]}], "generation": 1}
    (directory / "state" / "gateway" / "aliases.json").write_text(json.dumps({**TABLE, "aliases": {"npc": route}}))
    path = directory / "eternad.toml"
    path.write_text(
        'library_directory = "library"\nstate_directory = "state"\n'
        f'[engines.local]\nurls = ["{engine_url}"]\n[models.npc]\nbase_path = "base"\nengine = "local"\n'
        f'[gateway]\naddress = "{gateway_url.removeprefix("http://")}"\n'
    )
    return path


async def one(replica: Replica, body: bytes) -> tuple[float, float]:
    """Seconds to the first byte of the body, and to the last."""
    started = time.perf_counter()
    exchange = await replica.send(b"/v1/completions", [(b"content-type", b"application/json")], body)
    chunks = exchange.chunks()
    await anext(chunks)
    first = time.perf_counter() - started
    async for _ in chunks:
        pass
    assert exchange.status == 200, exchange.status
    return first, time.perf_counter() - started


async def block(replica: Replica, body: bytes, requests: int, clients: int) -> list[tuple[float, float]]:
    """Closed loop: each client asks again when it has its answer."""

    async def client() -> list[tuple[float, float]]:
        return [await one(replica, body) for _ in range(requests // clients)]

    return [row for rows in await asyncio.gather(*(client() for _ in range(clients))) for row in rows]


async def wait_for(replica: Replica, body: bytes) -> None:
    """Until it answers."""
    for _ in range(300):
        try:
            return void(await one(replica, body))
        except (UpstreamFailed, AssertionError):
            await asyncio.sleep(0.1)
    raise TimeoutError(replica.url)


def void(_: object) -> None:
    """Drop a value."""


async def measure(direct: Replica, gateway: Replica, options: argparse.Namespace) -> None:
    """Alternate, and print what the gateway adds at the median and at the 99th percentile, in ms."""
    for stream in (False, True):
        bodies = [json.dumps({"model": name, "prompt": "x" * 2000, "stream": stream}, separators=(",", ":")).encode()
                  for name in ("npc@0001", "npc")]  # fmt: skip
        for replica, body in zip((direct, gateway), bodies, strict=True):
            await wait_for(replica, body)
            await block(replica, body, options.requests // 4, options.clients)
        rows: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        for number in range(options.blocks * 2):
            at = number % 2
            rows[at].extend(await block((direct, gateway)[at], bodies[at], options.requests, options.clients))
        for name, column in (("first byte", 0), ("whole", 1)):
            report(f"{'stream' if stream else 'plain'}, {name}", [[row[column] for row in side] for side in rows])


def report(title: str, sides: list[list[float]]) -> None:
    """One line."""
    (d50, d99), (g50, g99) = (
        (statistics.median(side) * 1e3, statistics.quantiles(side, n=100)[98] * 1e3) for side in sides
    )
    print(
        f"{title:20} direct p50 {d50:7.2f} p99 {d99:7.2f} | gateway p50 {g50:7.2f} p99 {g99:7.2f}"
        f" | adds p50 {g50 - d50:+.2f} p99 {g99 - d99:+.2f} ms  (n = {len(sides[0])} each)"
    )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--think-ms", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=400, help="of one block")
    parser.add_argument("--blocks", type=int, default=5, help="of each side")
    parser.add_argument("--unix", action="store_true", help="Unix sockets, as the systemd units have them, not TCP")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        urls = [address(directory, name, is_unix=options.unix) for name in ("engine.sock", "front.sock")]
        direct, gateway = (Replica(url, None, 2.0, 60.0) for url in urls)
        config = configure(directory, urls[1], urls[0])
        place = ["--uds", urls[0].removeprefix("unix:")] if options.unix else ["--port", urls[0].rpartition(":")[2]]
        uvicorn = ["-m", "uvicorn", "bench.gateway:engine", *place, "--no-access-log", "--log-level", "warning",
                   "--lifespan", "off"]  # fmt: skip
        children = [
            start(*uvicorn, think_ms=options.think_ms),
            start("-m", "daemon", "gateway", "--config", str(config)),
        ]
        try:
            asyncio.run(measure(direct, gateway, options))
        finally:
            for child in children:
                child.terminate()
            for child in children:
                child.wait(20)


if __name__ == "__main__":
    main()
