"""The daemon as its users meet it: intake of feedback, `eternad status`, idling, and from a dropped file to its answer.

Daemon, trainer and embedded engine are processes of their own, as in production; times of a run come from the
daemon's own audit rows.
"""

import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from bench.gateway import free_port
from bench.peers.update import ROOT, fact_lines
from bench.peers.work import Work, child
from bench.soak_feed import record
from strategies.request import read_progress

RECORDS = 20_000
IDLE_SECONDS = 15.0
STATUS_CALLS = 9
WAIT_SECONDS = 240.0
CONFIG = """\
library_directory = "library"
state_directory = "state"

[watch]
stability_seconds = 0.5

[engines.hall]
urls = ["http://127.0.0.1:{port}"]

[models.npc]
base_path = "{base}"
engine = "hall"
# takes feedback in and never learns
schedule = {{ threshold_examples = 1000000, max_age_seconds = 1e9 }}

[models.book]
base_path = "{base}"
engine = "hall"
general_directory = "{general}"
training = {{ epochs = 1, learning_rate = 1e-3 }}
strategy = [{{ name = "replay", general_ratio = 0.05 }}, {{ name = "distill", on = "general" }}]
schedule = {{ threshold_examples = 32, quiet_seconds = 0.0 }}
# what is measured is the way, not the lesson
gate = {{ new_gain_min = -100.0, drift_base_max = 1000.0, drift_previous_max = 1000.0, general_loss_max = 1000.0 }}
"""


class Place:
    """A library, a state directory and a daemon that looks after them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.library, self.state = directory / "library", directory / "state"
        self.daemon = 0

    def ask(self, question: str) -> list[tuple[object, ...]]:
        """Rows of the daemon's database; none before there is one."""
        try:
            database = sqlite3.connect(f"file:{self.state}/eternad.db?mode=ro", uri=True)
        except sqlite3.OperationalError:
            return []
        try:
            return database.execute(question).fetchall()
        except sqlite3.OperationalError:
            return []
        finally:
            database.close()

    def drop(self, target: str, lines: list[bytes]) -> float:
        """Put a finished file into the library as careful writers do; when it was there."""
        path = self.library / target
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(b"".join(lines))
        part.rename(path)
        return time.time()

    def cpu_seconds(self) -> float:
        """Of the daemon so far, with its children that have ended."""
        ticks = Path(f"/proc/{self.daemon}/stat").read_text("ascii").rsplit(")", 1)[1].split()[11:15]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> float:
        """Of the daemon now."""
        lines = Path(f"/proc/{self.daemon}/status").read_text("ascii").splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def until(is_done: Callable[[], bool], what: str, pause: float = 0.02, seconds: float = WAIT_SECONDS) -> float:
    """When it was so; raises TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(pause)
    return time.time()


def command(place: Place, *words: str) -> list[str]:
    """`eternad WORDS` on this place."""
    return [sys.executable, "-m", "daemon", "--config", str(place.directory / "eternad.toml"), *words]


@contextmanager
def running(place: Place, *words: str) -> Iterator[int]:
    """A server of the place for a while: its process id."""
    with (place.directory / f"{words[0]}.log").open("wb") as log:
        process = subprocess.Popen(command(place, *words), cwd=ROOT, stdout=log, stderr=log)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


def is_up(port: int) -> bool:
    """Whether the engine answers."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


def idle(place: Place) -> dict[str, float]:
    """Share of a CPU and resident memory of a daemon that has nothing to do."""
    time.sleep(2)
    before, began = place.cpu_seconds(), time.monotonic()
    time.sleep(IDLE_SECONDS)
    share = (place.cpu_seconds() - before) / (time.monotonic() - began)
    return {"daemon idle, % of a CPU": 100 * share, "daemon, resident bytes": place.resident_bytes()}


def status(place: Place) -> dict[str, float]:
    """`eternad status`, median wall time with the start of its interpreter."""
    taken = []
    for _ in range(STATUS_CALLS):
        began = time.monotonic()
        subprocess.run(command(place, "status"), cwd=ROOT, check=True, capture_output=True)
        taken.append(time.monotonic() - began)
    return {"eternad status": statistics.median(taken)}


def ingest(place: Place, records: int = RECORDS) -> dict[str, float]:
    """Feedback records per second from the drop until the last is durable, and per CPU second of the daemon."""
    lines = [json.dumps(record(number, time.time())).encode() + b"\n" for number in range(records)]
    before, used = place.ask("SELECT count(*) FROM record"), place.cpu_seconds()
    wanted = (int(str(before[0][0])) if before else 0) + records
    dropped = place.drop("feedback/npc/game/events.jsonl", lines)
    stored = until(lambda: place.ask("SELECT count(*) FROM record") == [(wanted,)], f"{wanted} records", 0.1)
    return {
        "feedback, records per second": records / (stored - dropped),
        "feedback, records per CPU second": records / (place.cpu_seconds() - used),
    }


def drop_to_served(place: Place, lines: list[bytes]) -> dict[str, float]:
    """Seconds from the drop to the start of the run, and to the answer with it; of that, after the last step."""
    dropped, steps = place.drop("content/book/porter/facts.jsonl", lines), [0.0]

    def is_over() -> bool:
        for (run,) in place.ask("SELECT id FROM run WHERE model = 'book'"):
            progress = read_progress(place.state / "runs" / str(run))
            if not steps[0] and progress is not None and progress.steps and progress.step == progress.steps:
                steps[0] = progress.at
        return bool(place.ask(f"SELECT 1 FROM run WHERE model = 'book' AND state IN ({ENDS})"))

    until(is_over, "the end of the run", 0.05)
    ((state, reason, created, ended),) = place.ask("SELECT state, reason, created_at, updated_at FROM run")
    if state != "LIVE":
        raise RuntimeError(f"the run ended as {state}: {reason}; see {place.directory}")
    began, live = float(str(created)), float(str(ended))
    return {"drop to run": began - dropped, "drop to served": live - dropped, "last step to served": live - steps[0]}


ENDS = "'LIVE', 'REJECTED', 'FAILED', 'CANCELLED'"


def measure(work: Work, _: str) -> dict[str, float]:
    """All of it, on one daemon."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        place, port = Place(Path(directory)), free_port()
        general = Path(work.texts[0]).absolute()
        text = CONFIG.format(port=port, base=Path(work.base).absolute(), general=general)
        (place.directory / "eternad.toml").write_text(text, "utf-8")
        place.library.mkdir()
        place.daemon = stack.enter_context(running(place, "run"))
        stack.enter_context(running(place, "serve", "hall"))
        until(lambda: is_up(port), "the engine", 0.2)
        found = idle(place) | status(place)
        found |= ingest(place)
        return found | drop_to_served(place, fact_lines(work.seed, 71))


if __name__ == "__main__":
    child(measure)
