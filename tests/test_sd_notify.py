"""The sd_notify protocol against a fake supervisor."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.machine.sd_notify import inherited_sockets, notify, notify_reloading, watchdog_seconds


@pytest.fixture(params=["path", "abstract"])
def supervisor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """A datagram socket in the place of systemd's, named in the environment."""
    path = str(tmp_path / "notify") if request.param == "path" else f"@eternad-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path.replace("@", "\0", 1) if path.startswith("@") else path)
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield receiver


def test_fields_arrive_as_one_datagram(supervisor: socket.socket) -> None:
    """All fields of a call arrive together, one a line, over a path and over an abstract socket."""
    assert notify(READY=1, STATUS="12 pending")
    assert supervisor.recv(4096) == b"READY=1\nSTATUS=12 pending"


def test_a_value_cannot_smuggle_in_a_field(supervisor: socket.socket) -> None:
    """Line breaks in a status become spaces: a file name with one cannot send STOPPING=1."""
    assert notify(STATUS="reading a\nSTOPPING=1")
    assert supervisor.recv(4096) == b"STATUS=reading a STOPPING=1"


def test_lone_surrogates_are_replaced(supervisor: socket.socket) -> None:
    """A file name that is not UTF-8 does not stop the message."""
    assert notify(STATUS="caf\udce9")
    assert supervisor.recv(4096) == b"STATUS=caf?"


def test_reloading_carries_the_monotonic_time(supervisor: socket.socket) -> None:
    """RELOADING=1 comes with the time since boot in microseconds, as Type=notify-reload wants it."""
    before = time.monotonic()
    assert notify_reloading()
    lines = dict(line.split("=", 1) for line in supervisor.recv(4096).decode().splitlines())
    assert lines["RELOADING"] == "1"
    assert before * 1e6 - 1 <= int(lines["MONOTONIC_USEC"]) <= time.monotonic() * 1e6


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "relative", "@eternad-nobody-there", "/" + "x" * 200])
def test_without_a_supervisor_nothing_is_raised(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket, a vanished one, or an impossible name: False, and the daemon goes on."""
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify(READY=1) is False


@pytest.mark.parametrize(
    ("microseconds", "seconds"), [("60000000", 60.0), ("500000", 0.5), ("0", None), ("-1", None), ("soon", None)]
)
def test_watchdog_interval(microseconds: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is read in seconds; nonsense means that nobody watches."""
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert watchdog_seconds() == seconds


def test_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that inherited the environment is not the one that systemd watches."""
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_seconds() == 60.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    assert watchdog_seconds() is None


def test_sockets_are_taken_over_from_systemd() -> None:
    """A child started as systemd does it accepts on the socket that its parent listens on."""
    program = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "from daemon.machine.sd_notify import inherited_sockets\n"
        "[listener] = inherited_sockets(); assert inherited_sockets() == []; assert not listener.get_inheritable()\n"
        "listener.accept()[0].sendall(b'hello')"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor = listener.fileno()
        command = [sys.executable, "-c", program, str(descriptor)]
        child = subprocess.Popen(command, pass_fds=[descriptor], env={**os.environ, "LISTEN_FDS": "1"})
        with socket.create_connection(listener.getsockname(), timeout=30) as connection:
            assert connection.recv(16) == b"hello"
    assert child.wait(30) == 0


def test_sockets_of_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """LISTEN_FDS that was meant for a parent is ignored, and so is nonsense."""
    for pid, count in ((os.getppid(), "1"), (os.getpid(), "many")):
        monkeypatch.setenv("LISTEN_PID", str(pid))
        monkeypatch.setenv("LISTEN_FDS", count)
        assert inherited_sockets() == []
