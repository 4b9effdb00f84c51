"""Ray: what is said where it is not installed, and when a cluster that is too small is given up."""

import os
import signal
import socket
import sys
from pathlib import Path
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


class FakeRay(SimpleNamespace):
    """As much of Ray as joining a cluster takes."""

    class exceptions:  # noqa: N801
        """Ray's."""

        class AuthenticationError(Exception):
            """Not a RuntimeError."""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRay:
    """A Ray that can be joined, in a home without a token."""
    found = FakeRay(init=lambda **_: None, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setattr(ray_cluster, "require", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", *ray_cluster.TOKENS, *ray_cluster.DEFAULTS):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever is set meanwhile
        monkeypatch.delenv(name)
    return found


def test_a_fresh_cluster_without_a_token_is_joined_with_a_warning(
    ray: FakeRay, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ray start --head` makes such a one: it works, and the log says what that means."""
    with ray_cluster.joined():
        assert "RAY_AUTH_MODE" not in os.environ
    assert "asks for no token" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["file", "variable"])
def test_a_token_is_shown_where_there_is_one(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """In the variable, or in the file that `ray get-auth-token --generate` writes."""
    if where == "file":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("t")
    else:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    with ray_cluster.joined():
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert capsys.readouterr().err == ""


def test_a_token_that_is_missing_is_one_sentence(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster wants one and there is none: no traceback, and no trainer that dies without a reason."""

    def refuse(**_: object) -> None:
        raise ray.exceptions.AuthenticationError("no authentication token was found.\nMore lines")

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    ray.init = refuse
    with pytest.raises(NoCluster, match=r"no authentication token was found\.\)"), ray_cluster.joined():
        pass


def test_whoever_joins_keeps_its_handlers_of_signals(ray: FakeRay) -> None:
    """Ray installs one for SIGTERM that aborts: no worker would ever write its checkpoint."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    ray.init = lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ray_cluster.joined():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]
