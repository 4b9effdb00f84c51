"""Parsing by a process that is reached through a socket, with systemd's part played by a thread."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
import pytest

from daemon.config import Watch
from daemon.ingest.sandbox import Task
from daemon.parse import in_unit

TASK = msgspec.json.encode(Task("csv", Watch())).decode()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket unit's socket."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "parse.sock"))
        listening.listen()
        yield listening


@pytest.fixture
def content() -> Iterator[IO[bytes]]:
    """A file with one example, open, and read to its end."""
    with tempfile.TemporaryFile() as file:
        file.write(b"prompt,completion\nWho reads?,The Library reads.\n")
        file.flush()
        yield file


def serve_once(listener: socket.socket) -> threading.Thread:
    """Accept one connection and start the unit's program on it, as Accept=yes does."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            subprocess.run([sys.executable, "-m", "daemon.parse"], stdin=connection, stdout=connection, check=True)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_the_answer_is_the_parser_s(listener: socket.socket, content: IO[bytes], tmp_path: Path) -> None:
    """Task and file go over the socket; what comes back is what the plain child process writes."""
    thread = serve_once(listener)
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as expected:
        assert in_unit(content.fileno(), TASK, answer.fileno(), seconds=60, path=tmp_path / "parse.sock") == ""
        thread.join()
        content.seek(0)
        command = [sys.executable, "-m", "daemon.ingest.child", TASK]
        subprocess.run(command, stdin=content, stdout=expected, check=True)
        said = os.pread(answer.fileno(), 65536, 0)
        assert said == os.pread(expected.fileno(), 65536, 0)
        assert b"The Library reads." in said


def test_a_parser_that_hangs_is_given_up(listener: socket.socket, content: IO[bytes], tmp_path: Path) -> None:
    """Nobody accepts: after the time the caller hears that it took too long."""
    with tempfile.TemporaryFile() as answer:
        said = in_unit(content.fileno(), TASK, answer.fileno(), seconds=0.2, path=tmp_path / "parse.sock")
    assert said == "took longer than 0.2 s"


def test_a_socket_that_is_not_there_is_said(content: IO[bytes], tmp_path: Path) -> None:
    """Without the unit the caller hears where it was looked for."""
    with tempfile.TemporaryFile() as answer:
        said = in_unit(content.fileno(), TASK, answer.fileno(), seconds=1, path=tmp_path / "nobody.sock")
    assert said == f"could not be reached at {tmp_path / 'nobody.sock'}: No such file or directory"
