"""`make soak`: the daemon under steady feedback for hours, with a real update every few minutes of a tiny model.

    python -m bench.soak --minutes 120
    python -m bench.soak --minutes 120 --report-only      # figures and picture of what was sampled, also while it runs

Everything is real but the model: `eternad run`, its trainers, the embedded engine, a status page that is scraped like
Prometheus does. Samples go to `.bench/soak/samples.jsonl`; figures and picture into `docs/`.
"""

import argparse
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import msgspec

from bench.gateway import free_port
from bench.soak_feed import Feed
from bench.soak_report import Sample, read_samples, write_page

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".bench" / "soak"
SAMPLE_SECONDS, BEAT_SECONDS = 10.0, 0.5
CONFIG = """
library_directory = "library"
state_directory = "state"
web = {{ listen = "127.0.0.1:{page}" }}
# one player is many here: nothing of it is meant to wait
trust = {{ sources = {{ game = {{ trusted = true }} }} }}
[engines.local]
urls = ["http://127.0.0.1:{engine}"]
[models.npc]
base_path = "base"
engine = "local"
lora = {{ rank = 4 }}
training = {{ epochs = 1, learning_rate = 1e-3 }}
strategy = [{{ name = "replay" }}]
buffer = {{ examples = 500 }}
schedule = {{ interval_seconds = {interval}, threshold_examples = 1000000, max_age_seconds = 1e9, examples_max = 2000 }}
versions_kept = 3
# random weights prove nothing: the gate lets all pass but what is not finite
[models.npc.gate]
old_loss_max = 100.0
eval_loss_max = 100.0
drift_base_max = 1000.0
drift_previous_max = 1000.0
general_loss_max = 1000.0
new_gain_min = -100.0
"""


def prepare(place: Path, engine: int, page: int, interval: float) -> None:
    """A fresh place with a tiny base model and a configuration."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_tiny_base

    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    make_tiny_base(place / "base")
    (place / "eternad.toml").write_text(CONFIG.format(engine=engine, page=page, interval=interval))


def start(place: Path, *command: object) -> subprocess.Popen[bytes]:
    """A child of the soak; its output goes to a file beside the samples."""
    with (place / f"{command[0]}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", *map(str, command)], cwd=ROOT, stdout=log, stderr=log)


def wait_for(url: str, seconds: float = 120.0) -> None:
    """Until a server answers; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} does not answer; see {PLACE}/*.log") from None
            time.sleep(0.5)


def sample(place: Path, pid: int, written: int) -> Sample:
    """Of the daemon's process, and of what its database says."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in process.joinpath("status").read_text().splitlines())
    ticks = process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[11:13]
    database = sqlite3.connect(f"file:{place}/state/eternad.db?mode=ro", uri=True)
    states = dict(database.execute("SELECT state, count(*) FROM run GROUP BY 1").fetchall())
    stored = int(database.execute("SELECT coalesce(max(rowid), 0) FROM record").fetchone()[0])
    database.close()
    return Sample(
        at=time.time(),
        rss_kib=int(status["VmRSS"].split()[0]),
        anonymous_kib=int(status["RssAnon"].split()[0]),
        descriptors=sum(1 for _ in process.joinpath("fd").iterdir()),
        threads=int(status["Threads"]),
        cpu_seconds=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        written=written,
        stored=stored,
        runs=states,
    )


def soak(place: Path, minutes: float, rate: float, interval: float) -> None:
    """Feed the daemon for so long, sampling; ends it as systemd would."""
    engine, page = free_port(), free_port()
    prepare(place, engine, page, interval)
    state = place / "state" / "versions"
    state.mkdir(parents=True)
    server = start(place, "serving", "--base", place / "base", "--adapter-root", state, "--port", engine)
    daemon = start(place, "daemon", "run", "--config", place / "eternad.toml")
    try:
        for url in (f"http://127.0.0.1:{engine}/health", f"http://127.0.0.1:{page}/metrics"):
            wait_for(url)
        keep_feeding(place, daemon, f"http://127.0.0.1:{page}/metrics", 60 * minutes, Feed(place / "library", rate))
    finally:
        for child in (daemon, server):
            child.send_signal(signal.SIGTERM)
            child.wait(90)


def keep_feeding(place: Path, daemon: subprocess.Popen[bytes], metrics: str, seconds: float, feed: Feed) -> None:
    """The soak itself; raises RuntimeError when the daemon ends by itself."""
    end, next_sample = time.monotonic() + seconds, 0.0
    with (place / "samples.jsonl").open("ab", buffering=0) as samples:
        while (now := time.monotonic()) < end:
            feed.top_up()
            if now >= next_sample:
                next_sample = now + SAMPLE_SECONDS
                wait_for(metrics)
                samples.write(msgspec.json.encode(sample(place, daemon.pid, feed.written)) + b"\n")
            if daemon.poll() is not None:
                raise RuntimeError(f"the daemon ended with status {daemon.returncode}; see {place}/daemon.log")
            time.sleep(BEAT_SECONDS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--rate", type=float, default=500.0, help="feedback records per second")
    parser.add_argument("--interval", type=float, default=300.0, help="seconds between two updates")
    parser.add_argument("--place", type=Path, default=PLACE)
    parser.add_argument("--report-only", action="store_true", help="of the samples that are there")
    chosen = parser.parse_args()
    if not chosen.report_only:
        soak(chosen.place, chosen.minutes, chosen.rate, chosen.interval)
    print(write_page(read_samples(chosen.place / "samples.jsonl"), chosen.interval, ROOT / "docs"))


if __name__ == "__main__":
    main()
