"""Formats that can hurt their parser are read in a child process with limits; a crash there is one bad file here.

The child gets the open file as its standard input and nothing else: no network, no other descriptor, no way to write.
It answers with lines of JSON (`Found`, at the end one `Done`), and everything that it says is checked again.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import msgspec

from buffers.example import Example
from daemon import parse
from daemon.config import Watch
from daemon.ingest.lines import read_lines
from daemon.ingest.problem import Problem
from daemon.ingest.prose import Located

TIMEOUT_SECONDS = 60.0
ANSWER_LINE_BYTES_MAX = 128 * 1024 * 1024
ATTEMPTS = 2


class Task(msgspec.Struct, frozen=True):
    """What a child is to do: its only argument."""

    suffix: str
    """What the file's name ends with, such as `csv` or `jsonl.gz`."""
    watch: Watch


class Found(msgspec.Struct, frozen=True, tag="found"):
    """One example."""

    example: Example
    line: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The end of the file, or why it cannot be read."""

    found: int = 0
    code: str = ""
    message: str = ""
    line: int | None = None
    byte_offset: int | None = None


_example, _done = msgspec.json.Decoder(Found), msgspec.json.Decoder(Done)


def read(descriptor: int, suffix: str, watch: Watch) -> Iterator[Located]:
    """Everything that a file holds; raises `Problem`. A child that breaks is tried once more, with a fresh one."""
    with tempfile.TemporaryFile() as answer:  # not in memory: an answer may be large
        broken = ""
        for _ in range(ATTEMPTS):
            broken = _run(descriptor, Task(suffix, watch), answer.fileno())
            done = None if broken else _last(answer.fileno())
            if done is not None:
                yield from _found(answer.fileno(), done)
                return
        reason = broken or "gave no answer"
        message = f"the {suffix} parser {reason}, twice: split the file, or save it in another format"
        raise Problem("parser_died", message, retryable=True)


def _run(descriptor: int, task: Task, answer: int) -> str:
    """Run one child to its end; how it broke, or an empty string."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.lseek(answer, 0, os.SEEK_SET)
    os.truncate(answer, 0)
    if parse.SOCKET.exists():  # a unit without network and GPU, for a daemon that has them
        return parse.in_unit(descriptor, msgspec.json.encode(task).decode(), answer, seconds=TIMEOUT_SECONDS)
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "daemon.ingest.child", msgspec.json.encode(task).decode()]
    try:
        ended = subprocess.run(
            command, stdin=descriptor, stdout=answer, stderr=subprocess.DEVNULL, env=environment, cwd="/",
            start_new_session=True, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"took longer than {TIMEOUT_SECONDS:g} s"
    if ended.returncode < 0:
        return f"was ended by signal {-ended.returncode}"
    return f"ended with status {ended.returncode}" if ended.returncode else ""


def _last(answer: int) -> Done | None:
    """The last line, if it says that the child came to its end; raises `Problem` when it says why it could not."""
    size = os.fstat(answer).st_size
    *_, line = os.pread(answer, 65536, max(size - 65536, 0)).removesuffix(b"\n").split(b"\n")
    try:
        done = _done.decode(line)
    except (msgspec.DecodeError, ValueError):
        return None
    if done.code:
        raise Problem(done.code, done.message, line=done.line, byte_offset=done.byte_offset)
    return done


def _found(answer: int, done: Done) -> Iterator[Located]:
    try:
        for line in itertools.islice(read_lines(answer, line_bytes_max=ANSWER_LINE_BYTES_MAX), done.found):
            said = _example.decode(line.body or b"")
            yield said.example, said.line
    except (msgspec.DecodeError, ValueError):
        raise Problem("parser_died", "the parser's answer is damaged", retryable=True) from None
