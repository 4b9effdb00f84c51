"""Ray: what is said where it is not installed, and when a cluster that is too small is given up."""

import socket
import sys
from types import SimpleNamespace

import pytest

from strategies import ray_cluster
from strategies.ray_cluster import NoCluster, Room


def test_without_ray_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, before anything is started."""
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoCluster, match=r"^`ray` is not installed here: pip install 'eternad\[ray\]'$"):
        ray_cluster.require()


def test_a_cluster_that_stays_too_small_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that comes back in time is no shortage; one that does not is, and the message says what is missing."""
    there = {"CPU": 1.0}
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: there))
    now = 100.0
    monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: now)
    room = Room({"CPU": 2.0}, patience_seconds=10)
    now = 109.0
    assert room.shortage() == ""
    there["CPU"] = 2.0
    now = 115.0
    assert room.shortage() == ""
    there["CPU"] = 0.0
    now = 124.0
    assert room.shortage() == ""
    now = 126.0  # too early to look again
    assert room.shortage() == ""
    now = 130.0
    assert "has lacked 2 CPU (there are 0)" in room.shortage()


def test_an_address_where_nobody_is_is_said_at_once() -> None:
    """Ray would look for minutes; what is no `HOST:PORT` is left to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(NoCluster, match=r"nobody answers at RAY_ADDRESS = 127.*`ray start --head` there$"):
        ray_cluster.knock(address)
    ray_cluster.knock("")
    ray_cluster.knock("ray://elsewhere:10001")
