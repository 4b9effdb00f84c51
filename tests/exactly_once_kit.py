"""What the tests of exactly-once share: an intake as a process that is killed, producers that know what they wrote."""

import contextlib
import http.client
import multiprocessing
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import rensa  # noqa: F401 - what the intake imports when it is needed: here once, in the process that forks
import uvloop  # noqa: F401
from feedback_kit import record

from daemon import ingest, intake
from daemon.config import Config, Engine, Model, Watch
from daemon.config import Intake as Door
from daemon.ingest import feedback_file
from daemon.ingest.opened import signature_of
from daemon.state import files
from daemon.state.database import open_database, open_read_only
from daemon.trust.policy import Source, Trust
from daemon.watch import Watcher
from daemon.web import server  # noqa: F401

HOME = Path(__file__).resolve().parent
RATED_EVERY = 10
"""Such a record is a rating, which gives an example; the others are telemetry."""


def config_of(directory: Path) -> Config:
    """One model, and two sources that only staff write to."""
    return Config(
        library_directory=directory / "library", state_directory=directory / "state",
        models={"npc": Model(base_path=directory, engine="e")}, engines={"e": Engine()},
        trust=Trust(sources={"game": Source(trusted=True), "live": Source(trusted=True)}),
        watch=Watch(scan_seconds=0.3), intake=Door(socket=directory / "intake.sock"),
    )  # fmt: skip


def line(number: int) -> bytes:
    """Record `number` as a line."""
    subject = {"id": f"h:{number % 50:016x}"}
    if number % RATED_EVERY == 0:
        return bytes(msgspec.json.encode(record(number, subject=subject))) + b"\n"
    return bytes(msgspec.json.encode(record(number, "float", subject=subject, output=None))) + b"\n"


def run_intake(directory: Path, batch_lines: int, ready: Any) -> None:
    """What the daemon does with feedback, in a process of its own: endpoint, watcher and journal, until it is killed.

    With a file `stop` it ends by itself once everything is taken in.
    """
    feedback_file.BATCH_LINES = batch_lines
    config = config_of(directory)
    database = open_database(directory / "state" / "eternad.db")
    watcher = Watcher(config.library_directory, config.watch)
    watcher.start()
    intake.serve(lambda: config, time.time)
    ready.set()
    while True:
        is_last = (directory / "stop").exists()
        found = watcher.finished(time.time(), partial(files.known, database))
        for finished in found:
            if ingest.ingest_file(database, config, finished, time.time()).state == "partial":
                watcher.again(finished.relative)
        if is_last and not found and not watcher.waiting:
            os._exit(0)
        time.sleep(0.002)


class Intake:
    """The process; forked from one that has everything imported, so that five hundred kills take minutes."""

    def __init__(self, directory: Path) -> None:
        paths = os.pathsep.join([str(HOME), str(HOME.parent)])
        os.environ["PYTHONPATH"] = paths  # for the server that forks
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["exactly_once_kit"])
        self._directory = directory
        self.kills = 0

    def start(self, batch_lines: int) -> BaseProcess:
        """Start it and wait until it listens."""
        ready = self._context.Event()
        process = self._context.Process(target=run_intake, args=(self._directory, batch_lines, ready))
        process.start()
        assert ready.wait(60), "the intake does not start"
        return process

    def kill(self, process: BaseProcess) -> None:
        """SIGKILL."""
        process.kill()
        process.join()
        self.kills += 1

    def finish(self) -> None:
        """Let it take in everything that is left."""
        (self._directory / "stop").touch()
        process = self.start(1000)
        process.join(300)
        assert process.exitcode == 0


class Producer:
    """Writes to one file as game servers and log rotation do; knows what it wrote, in order, file by file."""

    def __init__(self, directory: Path, name: str, first: int) -> None:
        self._directory = directory
        self._places = config_of(directory).library_directory / "feedback/npc/game"
        self._places.mkdir(parents=True, exist_ok=True)
        self.path, self.next, self._moves = self._places / f"{name}.jsonl", first, first
        self.written: list[list[int]] = [[]]

    def append(self, count: int) -> None:
        """Write so many more records, the last of them in two pieces."""
        numbers = range(self.next, self.next + count)
        whole = b"".join(map(line, numbers))
        with self.path.open("ab") as file:
            file.write(whole[:-40])
            file.flush()
            file.write(whole[-40:])
        self.next += count
        self.written[-1] += numbers

    def rotate(self) -> None:
        """Rename the file away and go on with a new one."""
        if self.path.exists():
            self._moves += 1
            self.path.rename(self.path.with_name(f"{self.path.name}.{self._moves}"))
            self.written.append([])

    def rename(self) -> None:
        """Give the file another name and go on writing to it."""
        if self.path.exists():
            self._moves += 1
            self.path = self.path.rename(self.path.with_name(f"moved-{self._moves}.jsonl"))

    def replace(self) -> None:
        """Put a copy that holds everything so far in the place of the file."""
        copy = self.path.with_name(f".{self.path.name}")
        copy.write_bytes(self.path.read_bytes() if self.path.exists() else b"")
        copy.rename(self.path)

    def truncate(self, keep: float) -> bool:
        """Cut the file in place, as `copytruncate` does, if everything in it has been taken in; whether it was."""
        if not self.path.exists() or not self.is_read():
            return False
        lines = self.path.read_bytes().splitlines(keepends=True)
        os.truncate(self.path, sum(map(len, lines[: int(len(lines) * keep)])))
        return True

    def is_read(self) -> bool:
        """Whether everything in the file has been taken in."""
        if not self.path.exists():
            return False
        with contextlib.closing(open_read_only(self._directory / "state" / "eternad.db")) as database:
            row = files.get(database, str(self.path.relative_to(config_of(self._directory).library_directory)))
        # the whole signature: after a truncation it may have grown to the size that it had when it was read
        seen = signature_of(self.path.stat())
        return row is not None and (row.signature, row.offset) == (seen, seen.size)


def wait_for(is_so: Callable[[], bool], seconds: float) -> bool:
    """Wait until it is so, at most so long; whether it is."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.005)
    return True


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("intake", timeout=10)
        self._path = str(path)

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(self._path)


class Client:
    """A game server that posts records one request after the other; what gets no answer it sends again."""

    def __init__(self, directory: Path, first: int, seed: int) -> None:
        self._path, self._draw = directory / "intake.sock", random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.next, self.acknowledged, self.given_up = first, list[int](), set[int]()
        self.resent = 0

    def start(self) -> None:
        """Begin to post."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the request that is under way."""
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            numbers = range(self.next, self.next + self._draw.randrange(1, 60))
            self.next = numbers.stop
            body = b"".join(map(line, numbers))
            patience = self._draw.choice([1, 1000, 1000, 1000, 1000])
            for attempt in range(patience):
                if self._post(body):
                    self.acknowledged += numbers
                    break
                self.resent += attempt > 0
                if self._stop.wait(0.005):
                    break
            else:
                self.given_up |= set(numbers)
                continue
            if numbers[-1] not in self.acknowledged[-1:]:
                self.given_up |= set(numbers)

    def _post(self, body: bytes) -> bool:
        connection = _Connection(self._path)
        try:
            connection.request("POST", "/v1/feedback/npc/live", body)
            return connection.getresponse().status == 202
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def stored_numbers(directory: Path) -> list[int]:
    """The records of the journal, in their order."""
    with contextlib.closing(open_read_only(directory / "state" / "eternad.db")) as database:
        found = database.execute("SELECT id FROM record ORDER BY rowid")
        return [int(identity.rpartition("-")[2], 16) for (identity,) in found]


def is_subsequence(part: Iterable[int], whole: Iterable[int]) -> bool:
    """Whether `whole` holds `part` in its order."""
    rest: Iterator[int] = iter(whole)
    return all(each in rest for each in part)
