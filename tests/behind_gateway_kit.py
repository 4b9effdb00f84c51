"""What the tests of engines behind a gateway share: one gateway a module, a vLLM without aliases, its client."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_dialects import FakeVllm
from fake_engine import canary
from gateway_kit import Gateway, running
from serving_kit import served

from daemon.config import Engine as Settings
from daemon.engines.build import build
from daemon.engines.contract import Version
from daemon.engines.gateway import BehindGateway
from strategies.request import Canary


@pytest.fixture(scope="module", name="gateway")
def gateway_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for the whole module."""
    with running(tmp_path_factory.mktemp("gateway")) as process:
        yield process


@pytest.fixture(autouse=True)
def clean_table(gateway: Gateway) -> None:
    """An empty table."""
    for alias in gateway.admin("GET", "/aliases").json()["aliases"]:
        gateway.admin("DELETE", f"/aliases/{alias}")


@pytest.fixture(name="versions")
def versions_fixture(tmp_path: Path) -> list[Version]:
    """npc@0000 .. npc@0005 on disk."""
    for number in range(6):
        (tmp_path / f"{number:04d}").mkdir()
    return [Version(model="npc", number=number, path=tmp_path / f"{number:04d}") for number in range(6)]


@pytest.fixture(name="vllm")
def vllm_fixture() -> FakeVllm:
    """An engine without aliases."""
    return FakeVllm()


@pytest.fixture(name="engine")
def engine_fixture(vllm: FakeVllm, gateway: Gateway) -> Iterator[BehindGateway]:
    """Its client, as the configuration makes it."""
    with served(vllm) as url:
        client = build(Settings(kind="vllm", urls=[url], timeout_seconds=5.0), gateway.admin_socket)
        assert isinstance(client, BehindGateway)
        yield client
        client.close()


def canaries(version: Version) -> list[Canary]:
    """One canary of a version."""
    return [canary(version.path)]
