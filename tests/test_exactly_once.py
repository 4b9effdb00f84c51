"""Every record counts once and in order, whatever is killed when, while files grow, rotate and are replaced."""

import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from feedback_kit import Site, line, record

from daemon.state import audit, quarantine
from daemon.state.database import open_database

INGEST_CHILD = """
    import os, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from daemon import ingest
    from daemon.config import Config, Engine, Model, Source, Trust
    from daemon.ingest import feedback_file
    from daemon.state import files
    from daemon.state.database import open_database
    from daemon.state.files import Finished, Signature
    feedback_file.BATCH_LINES = int(sys.argv[2])
    directory = Path(sys.argv[1])
    library = directory / "library"
    config = Config(library_directory=library, state_directory=directory / "state",
                    models={{"npc": Model(base_path=directory, engine="e")}}, engines={{"e": Engine()}},
                    trust=Trust(sources={{"game": Source(trusted=True)}}))
    database = open_database(directory / "state" / "eternad.db")
    print("ready", flush=True)
    while True:
        is_last, waiting = (directory / "stop").exists(), 0
        for path in sorted((library / "feedback/npc/game").iterdir()):
            name = str(path.relative_to(library))
            try:
                seen = os.lstat(path)
            except FileNotFoundError:
                continue
            signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
            if files.known(database, name) != signature:
                finished = Finished(path=name, relative=name, signature=signature)
                waiting += ingest.ingest_file(database, config, finished, 1.0).state == "partial"
        if is_last and not waiting:
            break
"""


class Producer:
    """Appends to one file, rotates it, truncates it once it is read, replaces it; knows what it wrote, in order."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.next = path, first
        self.written: list[list[int]] = [[]]

    def append(self, count: int) -> None:
        """Write so many more records, the last of them in two pieces."""
        numbers = list(range(self.next, self.next + count))
        whole = b"".join(line(record(number, subject={"id": f"h:{number % 50:016x}"})) for number in numbers)
        with self.path.open("ab") as file:
            file.write(whole[:-40])
            file.flush()
            file.write(whole[-40:])
        self.next += count
        self.written[-1] += numbers

    def rotate(self) -> None:
        """Rename the file away and go on with a new one."""
        if self.path.exists():
            self.path.rename(self.path.with_name(f"{self.path.name}.{self.next}"))
            self.written.append([])

    def replace(self) -> None:
        """Write a copy that holds everything so far, and put it in the place of the file."""
        copy = self.path.with_name(f".{self.path.name}")
        copy.write_bytes(self.path.read_bytes() if self.path.exists() else b"")
        copy.rename(self.path)


def kill_while_ingesting(directory: Path, kills: int, seed: int) -> None:
    """SIGKILL the ingesting child at random moments while files grow, rotate and are replaced; then ask the oracle."""
    draw, site = random.Random(seed), Site(directory)
    site.database.close()
    producers = [
        Producer(site.path.with_name(f"{name}.jsonl"), 100_000 * (index + 1)) for index, name in enumerate("abc")
    ]
    script = textwrap.dedent(INGEST_CHILD).format(root=str(Path(__file__).parent.parent))
    command = [sys.executable, "-c", script, str(directory), "7"]
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            for _ in range(draw.randrange(1, 6)):
                producer = draw.choice(producers)
                producer.append(draw.randrange(1, 60))
                if draw.random() < 0.3:
                    draw.choice([producer.rotate, producer.replace])()
                time.sleep(draw.random() * 0.02)
            child.kill()
    (directory / "stop").touch()
    command[-1] = "1000"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    check_once_and_in_order(directory, [each for producer in producers for each in producer.written])


def check_once_and_in_order(directory: Path, written: list[list[int]]) -> None:
    """Every record that was written is there once, per file in the order of writing, and nothing else is."""
    database = open_database(directory / "state" / "eternad.db")
    stored = [identity for (identity,) in database.execute("SELECT id FROM record ORDER BY rowid")]
    numbers = [int(identity.rpartition("-")[2], 16) for identity in stored]
    assert len(numbers) == len(set(numbers))
    file_of = {number: index for index, each in enumerate(written) for number in each}
    found: list[list[int]] = [[] for _ in written]
    for number in numbers:
        found[file_of[number]].append(number)
    assert found == written
    assert database.execute("SELECT count(*), sum(copies) FROM example").fetchone() == (len(numbers), len(numbers))
    assert quarantine.rows(database) == []
    assert audit.broken_at(database) is None
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def test_every_record_counts_once_whatever_is_killed_when(tmp_path: Path) -> None:
    """24 SIGKILLs while two files grow, rotate and are replaced."""
    kill_while_ingesting(tmp_path, 24, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_record_counts_once_after_500_kills(tmp_path: Path) -> None:
    """The same for longer."""
    kill_while_ingesting(tmp_path, 500, 2)
