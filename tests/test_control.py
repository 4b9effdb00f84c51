"""The control socket: orders reach the loop's queue, answers come back, and only who may open the socket may order."""

import os
import queue
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from operator_kit import answering

from daemon import control
from daemon.control import Client, Command, NotRunning, Order


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A control socket for tests that change nothing."""
    with answering(tmp_path_factory.mktemp("endpoint")) as handle:
        yield handle.path


def raw(path: Path, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.settimeout(5)
        connection.sendall(request)
        return connection.recv(65536)


def test_an_order_is_carried_out_and_answered_with_the_callers_user_id(tmp_path: Path) -> None:
    """What the loop answers is what the client prints, and the audit log learns who asked."""
    with answering(tmp_path / "s") as handle:
        reply = Client(handle.path).send(Order(action="rollback", model="npc", version=3))
    assert reply.ok and not reply.queued
    assert reply.text == f"rollback npc 3 None by uid:{os.getuid()}"


def test_a_refusal_and_its_reason_come_back(tmp_path: Path) -> None:
    """`ok` is false when the daemon could not do it."""
    with answering(tmp_path / "s") as handle:
        reply = Client(handle.path).send(Order(action="cancel", run_id="npc-9"))
    assert not reply.ok
    assert reply.text.startswith("no run npc-9")


def test_details_for_scripts_come_back(tmp_path: Path) -> None:
    """An update's answer carries the id of its run."""
    with answering(tmp_path / "s") as handle:
        assert Client(handle.path).send(Order(action="update", model="npc")).detail == {"run": "npc-00003"}


def test_an_order_that_the_loop_has_not_reached_is_said_to_be_queued() -> None:
    """A busy daemon never makes the caller wait without end."""
    reply = Command(Order(action="scan")).wait(0.01)
    assert reply.ok and reply.queued and "queued" in reply.text


def test_the_snapshot_is_served(tmp_path: Path) -> None:
    """What only the daemon knows: its pid, what engines serve, counters."""
    with answering(tmp_path / "s") as handle:
        status = Client(handle.path).status()
    assert status["pid"] == 4711
    assert status["engines"]["npc"]["serving"] == 2


def test_the_socket_is_for_its_owner_and_group(tmp_path: Path) -> None:
    """Mode 0660 from the first moment, whatever the umask is."""
    before = os.umask(0)
    try:
        with answering(tmp_path / "s") as handle:
            assert stat.S_IMODE(handle.path.stat().st_mode) == 0o660
    finally:
        os.umask(before)


def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    """A leftover socket file must not keep the next daemon from starting."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "control.sock"))
    with answering(tmp_path) as handle:
        assert Client(handle.path).status()["pid"] == 4711
    assert not (tmp_path / "control.sock").exists()


def test_a_state_directory_with_a_very_long_name_works(tmp_path: Path) -> None:
    """A socket's path may have 107 bytes, a state directory's more."""
    deep = tmp_path / ("d" * 120)
    with answering(deep) as handle:
        assert Client(handle.path).status()["pid"] == 4711


def test_clients_find_the_runtime_directorys_socket_in_the_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under systemd the socket lies in /run; the state directory links to it."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path / 'run'}:{tmp_path / 'other'}")
    state = tmp_path / "state"
    state.mkdir()
    path = control.socket_path(state)
    assert path == tmp_path / "run" / "control.sock"
    handle = control.serve(path, queue.Queue(), lambda: {"pid": 1}, link=state / "control.sock")
    try:
        assert Client(state / "control.sock").status()["pid"] == 1
    finally:
        handle.close()


def test_without_a_daemon_the_client_says_what_to_do(tmp_path: Path) -> None:
    """One sentence that names the socket and the command that starts a daemon."""
    with pytest.raises(NotRunning, match=r"control\.sock .*eternad run"):
        Client(tmp_path / "control.sock").status()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"POST /v1/commands HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", b"400"),
        (b"POST /v1/commands HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n{\"action\":\"evil\"}", b"400"),
        (b"POST /v1/commands HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b"413"),
        (b"POST /v1/commands HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST /v1/commands HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n", b"400"),
    ],
)  # fmt: skip
def test_what_is_no_order_is_refused(endpoint: Path, request_bytes: bytes, status: bytes) -> None:
    """Nothing but a well-formed order of bounded size reaches the queue."""
    assert raw(endpoint, request_bytes).split(b" ")[1] == status
