"""How fast the intake takes in what players say: records from files, requests on the socket, scans of many files.

    python -m bench.ingest                 # everything, each part in a process of its own
    python -m bench.ingest telemetry       # one part

Every rate is measured to durability: SQLite with `synchronous=FULL`, or the fsync behind a 202.
"""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bench import soak_feed
from bench.poison_world import World
from daemon import ingest, intake
from daemon.config import Config, Engine, Intake, Model
from daemon.ingest.opened import signature_of
from daemon.ingest.outcome import Outcome
from daemon.state import files
from daemon.state.database import Connection, open_database, transaction
from daemon.state.files import FileRow, Finished
from daemon.trust.policy import Source, Trust
from daemon.watch import Watcher

BYTES = 600
"""Of one record with its line end; shorter ones are filled up with a tag."""
RECORDS = 100_000
REQUESTS, CLIENTS = 20_000, 128
FILES, BACKLOG = 100_000, 20_000
NAME = "feedback/npc/game/events.jsonl"
Records = Iterator[dict[str, Any]]


def telemetry() -> Records:
    """What a game server sends: numbers about answers, and one thumb or correction in 250."""
    now = time.time()
    for number in itertools.count():
        yield soak_feed.record(number, now)


def thumbs() -> Records:
    """Nothing but ratings of answers that differ, from 20,000 players."""
    world = World(0)
    while True:
        yield world.clean(20_000)


def corrections() -> Records:
    """Nothing but better answers, each with the one that was shown: two examples a record."""
    world = World(1)
    while True:
        record = world.clean(20_000)
        yield {**record, "kind": "demonstration", "value": world.sentence()}


MIXES: dict[str, tuple[Callable[[], Records], Source]] = {
    "telemetry": (telemetry, Source()),
    "newcomers": (thumbs, Source()),
    "players": (thumbs, Source(probation_seconds=0)),
    "staff": (corrections, Source(trusted=True)),
}
"""`newcomers`: every subject is new, and waits in probation; `players`: all are known; `staff`: a trusted source."""


class Place:
    """A library with one feedback file, and a database."""

    def __init__(self, directory: Path, source: Source) -> None:
        self.library = directory / "library"
        self.path = self.library / NAME
        self.path.parent.mkdir(parents=True)
        self.config = Config(
            library_directory=self.library, state_directory=directory / "state",
            models={"npc": Model(base_path=directory, engine="e")}, engines={"e": Engine()},
            trust=Trust(sources={"game": source}),
        )  # fmt: skip
        self.database: Connection = open_database(directory / "state" / "eternad.db")

    def write(self, records: Records, count: int) -> None:
        """Append so many records of `BYTES` bytes."""
        with self.path.open("ab") as file:
            file.writelines(map(line, itertools.islice(records, count)))

    def take_in(self) -> Outcome:
        """One call of the daemon's step."""
        finished = Finished(path=NAME, relative=NAME, signature=signature_of(self.path.lstat()))
        return ingest.ingest_file(self.database, self.config, finished, time.time())


def line(record: dict[str, Any]) -> bytes:
    """A record as one line, filled up to `BYTES`."""
    bare = len(json.dumps(record)) + 1
    if BYTES - bare > len(', "tags": {"zone": ""}'):
        record = {**record, "tags": {"zone": "x" * (BYTES - bare - len(', "tags": {"zone": ""}'))}}
    return json.dumps(record).encode() + b"\n"


def from_file(directory: Path, mix: str, count: int = RECORDS) -> dict[str, float]:
    """Records per second from a file that lies there until the last is durable."""
    records, source = MIXES[mix]
    place = Place(directory, source)
    place.write(records(), count)
    began, used, longest, state = time.perf_counter(), time.process_time(), 0.0, "partial"
    while state == "partial":
        turn = time.perf_counter()
        state = place.take_in().state
        longest = max(longest, time.perf_counter() - turn)
    took, cpu = time.perf_counter() - began, time.process_time() - used
    stored = place.database.execute("SELECT count(*) FROM record").fetchone()[0]
    if stored != count:
        raise RuntimeError(f"{stored} of {count} records were stored")
    return {
        "records per second": count / took, "records per CPU second": count / cpu, "longest turn, s": longest,
        "bytes a record": place.path.stat().st_size / count, "peak RSS, MiB": peak_mib(),
    }  # fmt: skip


def on_socket(directory: Path) -> dict[str, float]:
    """Requests of one record each on the intake's Unix socket: the 202 comes after the fsync."""
    path = directory / "intake.sock"
    command = [sys.executable, "-m", "bench.ingest", "--serve", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        try:
            ticks = _cpu_seconds(server.pid)
            took, waits = asyncio.run(_ask(path, thumbs()))
            used = _cpu_seconds(server.pid) - ticks
            resident = _resident_mib(server.pid, "VmHWM")
        finally:
            server.terminate()
    written = sum(path.read_bytes().count(b"\n") for path in directory.rglob("*.jsonl"))
    if written != len(waits):
        raise RuntimeError(f"{written} records were written and {len(waits)} acknowledged")
    waits.sort()
    return {
        "requests per second": len(waits) / took, "requests per CPU second": len(waits) / used,
        "p50, ms": 1e3 * waits[len(waits) // 2], "p99, ms": 1e3 * waits[len(waits) * 99 // 100],
        "peak RSS, MiB": resident,
    }  # fmt: skip


async def _ask(path: Path, records: Records) -> tuple[float, list[float]]:
    """(seconds, latencies) of `REQUESTS` requests over `CLIENTS` kept connections."""
    bodies = [line(record) for record in itertools.islice(records, REQUESTS)]
    head = "POST /v1/feedback/npc/game HTTP/1.1\r\nHost: intake\r\nContent-Length: %d\r\n\r\n"
    waits: list[float] = []

    async def client(own: list[bytes]) -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        for body in own:
            began = time.perf_counter()
            writer.write((head % len(body)).encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(each[15:]) for each in answer.lower().split(b"\r\n") if each.startswith(b"content-length:")
            )
            await reader.readexactly(length)
            if not answer.startswith(b"HTTP/1.1 202"):
                raise RuntimeError(answer.decode())
            waits.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client(bodies[number::CLIENTS]) for number in range(CLIENTS)))
    return time.perf_counter() - began, waits


def serve(directory: Path) -> None:
    """The intake alone, until it is told to stop."""
    config = Place(directory, Source()).config
    config = msgspec.structs.replace(config, intake=Intake(socket=directory / "intake.sock"))
    handle = intake.serve(lambda: config, time.time)
    assert handle is not None
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM})
    handle.close()


def scan(directory: Path) -> dict[str, float]:
    """A reconcile scan of 100,000 files that are all known."""
    place = Place(directory, Source())
    _drop_files(place, FILES, 0)
    with transaction(place.database):
        for path in sorted((place.library / "content").rglob("*.txt")):
            row = FileRow(path=str(path.relative_to(place.library)), signature=signature_of(path.lstat()))
            files.put(place.database, row, time.time())
    watcher = Watcher(place.library, place.config.watch)
    watcher.start()
    used = time.process_time()
    found = watcher.finished(time.time(), partial(files.known, place.database))
    used = time.process_time() - used
    watcher.stop()
    if found or watcher.waiting:
        raise RuntimeError(f"{len(found)} finished, {watcher.waiting} waiting; all were known")
    return {"files": FILES, "scan, s": watcher.last_scan_seconds, "CPU s": used, "peak RSS, MiB": peak_mib()}


def backlog(directory: Path) -> dict[str, float]:
    """20,000 content files that came while nobody looked, from the first scan until the last is durable."""
    place = Place(directory, Source())
    _drop_files(place, BACKLOG, 60)
    watcher = Watcher(place.library, place.config.watch)
    watcher.start()
    began, used, count = time.perf_counter(), time.process_time(), 0
    # their time of change lies in the past only for the clock that the watcher is given
    later = place.config.watch.stability_seconds + 1
    while watcher.scans_total == 0 or watcher.waiting:
        found = watcher.finished(
            time.time() + later * min(watcher.scans_total, 1), partial(files.known, place.database)
        )
        if not found:
            time.sleep(0.05)
        for finished in found:
            count += ingest.ingest_file(place.database, place.config, finished, time.time()).new
    took, used = time.perf_counter() - began, time.process_time() - used
    watcher.stop()
    if count != BACKLOG:
        raise RuntimeError(f"{count} of {BACKLOG} files gave an example")
    return {
        "files": BACKLOG,
        "files per second": BACKLOG / took,
        "files per CPU second": BACKLOG / used,
        "peak RSS, MiB": peak_mib(),
    }


def _drop_files(place: Place, count: int, characters: int) -> None:
    for number in range(count):
        path = place.library / f"content/npc/shelf-{number // 1000:03d}/{number:06d}.txt"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_text(f"Door {number} leads to hall {number * 7919 % count}." + "x" * characters)


def _cpu_seconds(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(")", 1)[1].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    """Of this process alone: `ru_maxrss` would be carried over from whoever started it."""
    return _resident_mib(os.getpid(), "VmHWM")


def _resident_mib(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(float(each.split()[1]) / 1024 for each in lines if each.startswith(f"{name}:"))


def _of(mix: str) -> Callable[[Path], dict[str, float]]:
    return lambda directory: from_file(directory, mix)


PARTS = {mix: _of(mix) for mix in MIXES} | {"socket": on_socket, "scan": scan, "backlog": backlog}


def main(words: list[str]) -> None:
    """Measure one part here, or every part in a process of its own."""
    if words[:1] == ["--serve"]:
        serve(Path(words[1]))
    elif words:
        with tempfile.TemporaryDirectory() as directory:
            found = PARTS[words[0]](Path(directory))
        told = ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
        print(f"{words[0]}: {told} (load {os.getloadavg()[0]:.1f})")
    else:
        for name in PARTS:
            subprocess.run([sys.executable, "-m", "bench.ingest", name], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
