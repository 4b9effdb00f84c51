"""Swaps behind the gateway under load, and kills of gateway and engine between their steps."""

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from behind_gateway_kit import (
    canaries,
    clean_table,
    engine_fixture,
    gateway_fixture,
    versions_fixture,
    vllm_fixture,
)
from fake_dialects import FakeVllm
from gateway_kit import ASKED, Chatter, Gateway, engines, target, wait
from players import Players
from serving_kit import ROOT

from daemon.config import Engine as Settings
from daemon.engines.activate import activate
from daemon.engines.build import build
from daemon.engines.contract import Engine, EngineRefused, EngineUnavailable, Version
from daemon.engines.gateway import BehindGateway
from daemon.engines.reconcile import Desired, reconcile
from daemon.gateway.upstream import Replica

# httpcore leaves a Unix socket to the garbage collector when it cannot connect
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


__all__ = ["clean_table", "engine_fixture", "gateway_fixture", "versions_fixture", "vllm_fixture"]  # fixtures


@contextlib.contextmanager
def echo_engine() -> Iterator[str]:
    """The fake vLLM that answers by names, as a process; its url."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "echo_engine:app", "--app-dir", str(Path(__file__).parent),
               "--port", str(port), "--log-level", "warning", "--no-access-log", "--lifespan", "off"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def asked(crowds: list[Players]) -> int:
    """Answers so far."""
    return sum(players.asked for players in crowds)


def swap_under_load(engine: Engine, versions: list[Version], crowds: list[Players], requests: int) -> None:
    """Version after version is loaded, proven and pointed to, the oldest unloaded, each after its share of requests."""
    try:
        wait(lambda: asked(crowds), 60, "the players' start")
        for version in versions:
            before = asked(crowds)
            assert activate(engine, "npc", version, canaries(version)).version == version.name
            wait(lambda at=before: asked(crowds) - at >= requests / len(versions), 60, "load")
    finally:
        for players in crowds:
            players.stop()


def test_a_hundred_swaps_under_ten_thousand_requests(gateway: Gateway, tmp_path: Path) -> None:
    """8 players with the openai client, every second answer a stream: none fails, none mixes versions.

    The engine keeps three versions of a hundred and one, so a request that a swap sends astray is a 404.
    """
    versions = [Version(model="npc", number=number, path=tmp_path / f"{number:04d}") for number in range(101)]
    for version in versions:
        version.path.mkdir()
    with echo_engine() as url:
        engine = build(Settings(kind="vllm", urls=[url], timeout_seconds=10.0), gateway.admin_socket)
        wait(lambda: engine.health().ok, 60, "the engine's start")
        activate(engine, "npc", versions[0], canaries(versions[0]))
        crowds = [Players(gateway.url, 4) for _ in range(2)]
        swap_under_load(engine, versions[1:], crowds, 10_000)
        assert len(engine.loaded()) == 3
        engine.close()
    assert [fault for players in crowds for fault in players.faults] == []
    done = sum((players.done for players in crowds), Counter())
    assert done.total() >= 10_000 and len(done) >= 95


def swap_and_kill(
    gateway: Gateway, engine: BehindGateway, vllm: FakeVllm, version: Version, draw: random.Random
) -> None:
    """One activation, while gateway or engine dies at a random moment."""

    def swap() -> None:
        with contextlib.suppress(EngineUnavailable, EngineRefused):  # the reconciliation below tries again
            activate(engine, "npc", version, canaries(version))

    thread = threading.Thread(target=swap)
    thread.start()
    time.sleep(draw.uniform(0.0, 0.06))
    if draw.random() < 0.7:
        gateway.kill()
    else:
        vllm.restart()
    thread.join(30)


def check_kills(gateway: Gateway, engine: BehindGateway, vllm: FakeVllm, versions: list[Version], kills: int) -> None:
    """After each kill: the table is whole at once, and one reconciliation later the alias points to LIVE."""
    draw, live = random.Random(5), versions[0]
    for turn in range(kills):
        swap_and_kill(gateway, engine, vllm, versions[turn % len(versions)], draw)
        assert gateway.process is not None
        if gateway.process.poll() is not None:
            gateway.start()
        live = draw.choice(versions)  # what the daemon's database says, whatever the swap came to
        done = reconcile(engine, [Desired(alias="npc", version=live, canaries=canaries(live))], "another life")
        assert not done.errors and engine.aliases() == {"npc": live.name}
        assert gateway.admin("POST", "/v1/completions", ASKED).headers["x-adapter-version"] == live.name


@LEFT_OPEN
def test_kills_between_the_steps_of_a_swap(
    gateway: Gateway, engine: BehindGateway, vllm: FakeVllm, versions: list[Version]
) -> None:
    """Gateway and engine, six times."""
    check_kills(gateway, engine, vllm, versions, 6)


@LEFT_OPEN
@pytest.mark.slow
def test_two_hundred_kills_between_the_steps_of_a_swap(
    gateway: Gateway, engine: BehindGateway, vllm: FakeVllm, versions: list[Version]
) -> None:
    """The same 200 times."""
    check_kills(gateway, engine, vllm, versions, 200)


@LEFT_OPEN
def test_a_swap_with_a_thousand_requests_in_flight(gateway: Gateway) -> None:
    """All of them end whole on the version that they began with; what comes after the swap gets the next one."""
    chatter, requests = Chatter(), 1000
    body = json.dumps({**ASKED, "stream": True}).encode()
    seen: Counter[str] = Counter()

    async def ask(replica: Replica) -> None:
        exchange = await replica.send(b"/v1/completions", [(b"content-type", b"application/json")], body)
        version = exchange.head.header(b"x-adapter-version").decode()
        text = await exchange.body()
        assert exchange.status == 200 and text.endswith(b"[DONE]\n\n") and text.count(version.encode()) == 10
        seen[version] += 1

    def inflight() -> int:
        return int(gateway.admin("GET", "/inflight").json()["versions"].get("npc@0001", 0))

    async def swap_in_between(url: str) -> None:
        replica, running = Replica(gateway.url, None, 30.0, 120.0), list[asyncio.Task[None]]()
        while len(running) < requests:  # in waves: a busy machine must not take too long to connect
            running += [asyncio.create_task(ask(replica)) for _ in range(50)]
            while inflight() < len(running):
                assert not any(task.done() for task in running), [task.exception() for task in running if task.done()]
                await asyncio.sleep(0.02)
        assert gateway.put("npc", target("npc@0002", url)).status_code == 200
        assert chatter.hold is not None
        chatter.hold.set()
        await asyncio.gather(*running, ask(replica))
        replica.close()
        await asyncio.sleep(0.2)  # aborted transports are closed in the loop's next turns

    with engines(chatter) as (url,):
        chatter.hold = threading.Event()
        gateway.put("npc", target("npc@0001", url))
        asyncio.run(swap_in_between(url))
        assert gateway.admin("POST", "/drain", {"version": "npc@0001"}).json()["drained"]
    assert seen == {"npc@0001": requests, "npc@0002": 1}
