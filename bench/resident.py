"""`make bench-resident`: how fast the daemon is ready over a large journal, and what it costs while nothing happens.

    python -m bench.resident --rows 1000000 --seconds 150

The journal is real, its rows are copies of one example with hashes of their own; READY=1 is what systemd would wait
for. CPU is the process's own, so other work on the machine does not count.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from buffers import journal
from buffers.example import Example, Origin
from daemon.state.database import Connection, open_database, transaction

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
library_directory = "library"
state_directory = "state"
[engines.local]
kind = "directory"
urls = ["{place}/served"]
[models.npc]
base_path = "base"
engine = "local"
"""


def fill(state: Path, rows: int) -> None:
    """A journal of so many learned examples."""
    connection = open_database(state / "eternad.db")
    with transaction(connection):
        seed = Example(shape="demonstration", prompt="Where is door 1?", completion="In the hall of mirrors.")
        journal.add(connection, "npc", [(seed, Origin(file="content/npc/a.jsonl", line=1))], heldout_fraction=0.0)
        connection.execute("UPDATE example SET state = 'consumed', update_number = 1")
        multiply(connection, rows - 1)
        connection.execute("UPDATE intake SET distinct_examples = ?", (rows,))
    connection.close()


def multiply(connection: Connection, copies: int) -> None:
    """Copies of the one row there is, each with a hash and a weight of its own."""
    own = {"id": "NULL", "hash": "hex(randomblob(32))", "prompt_hash": "hex(randomblob(32))",
           "weight": "abs(random()) / 9223372036854775808.0"}  # fmt: skip
    names = [str(row[1]) for row in connection.execute("PRAGMA table_info(example)")]
    values = ", ".join(own.get(name, name) for name in names)
    connection.execute(
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
        f" INSERT INTO example ({', '.join(names)}) SELECT {values} FROM example, n WHERE example.id = 1",
        (copies,),
    )


def start(place: Path) -> tuple[subprocess.Popen[bytes], float, float]:
    """The daemon, and the wall and CPU seconds until it said READY=1."""
    address = place / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(address))
        listener.settimeout(120)
        began = time.monotonic()
        with (place / "daemon.log").open("wb") as log:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "daemon", "run", "--config", str(place / "eternad.toml")],
                env={**os.environ, "NOTIFY_SOCKET": str(address)}, cwd=ROOT, stderr=log, stdout=log,
            )  # fmt: skip
        while b"READY=1" not in listener.recv(4096):
            pass
        ready = time.monotonic() - began
    address.unlink()
    return daemon, ready, cpu_seconds(daemon.pid)


def cpu_seconds(pid: int) -> float:
    """Of the process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Of the process now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(place: Path, rows: int, seconds: float, settle: float = 10.0) -> str:
    """One line of figures. `settle`: seconds for the first turns, which scan the library and lay the ballast."""
    for name in ("base", "served"):
        (place / name).mkdir()
    (place / "base" / "config.json").write_text("{}")
    (place / "eternad.toml").write_text(CONFIG.format(place=place))
    fill(place / "state", rows)
    daemon, ready, ready_cpu = start(place)
    try:
        time.sleep(settle)
        before, began = cpu_seconds(daemon.pid), time.monotonic()
        time.sleep(seconds)
        share = (cpu_seconds(daemon.pid) - before) / (time.monotonic() - began)
        return (
            f"{rows:,} examples: READY in {ready:.2f} s ({ready_cpu:.2f} s CPU); idle {100 * share:.3f} % of a CPU"
            f" over {seconds:.0f} s, {resident_mib(daemon.pid):.1f} MiB resident"
        )
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=150.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(measure(Path(directory), chosen.rows, chosen.seconds))


if __name__ == "__main__":
    main()
