"""`make bench-poison`: fifty seeded attacks through the real intake, and what trust lets through of them.

Each attack comes into a library that has had writers' content and a week of players before, beside a day's clean
feedback. In half of them the attackers are new accounts, in the other half "sleepers" who have behaved for days. Said
is how many examples of the attack could be learned at all, how many are in the update that would be made next, whether
the offenders are named, and how many clean batches are held beside them or without them.
"""

import argparse
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from bench import poison_update
from bench.poison_world import ATTACKS, DAY, LORE, SLEEPERS, SUBJECTS, Record, World
from daemon import ingest
from daemon.config import Config, Engine, Model, Watch
from daemon.state import records
from daemon.state.database import open_database, transaction
from daemon.state.files import Finished, Signature
from daemon.state.runs import create
from daemon.state.waiting import share_of

NOW = 1_800_000_000.0
BATCH_RECORDS = 250
CLEAN_BATCHES = 4
PAST_RECORDS = 1500


class Site:
    """A library with its database, the game's channel `game` and the model `npc`."""

    def __init__(self, directory: Path, model: Model | None = None) -> None:
        self.directory, self.library = directory, directory / "library"
        self.config = Config(
            library_directory=self.library, state_directory=directory / "state",
            models={"npc": model or Model(base_path=directory, engine="none")}, engines={"none": Engine()},
            watch=Watch(heldout_fraction=0.1),
        )  # fmt: skip
        self.database: sqlite3.Connection = open_database(directory / "state" / "eternad.db")

    def drop(self, name: str, lines: Iterable[object], at: float) -> ingest.Outcome:
        """Write a file and take it in, all of it."""
        path = self.library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        seen = os.lstat(path)
        signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        finished = Finished(path=name, relative=name, signature=signature)
        outcome = ingest.ingest_file(self.database, self.config, finished, at)
        while outcome.state == "partial":
            outcome.count(more := ingest.ingest_file(self.database, self.config, finished, at))
            outcome.state = more.state
        return outcome

    def batch(self, name: str, rows: Iterable[Record], at: float) -> ingest.Outcome:
        """One file of the game's feedback."""
        return self.drop(f"feedback/npc/game/{name}.jsonl", rows, at)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one attack."""

    attack: str
    seed: int
    sleepers: bool
    records: int
    """Of the attackers."""
    believed: int
    """Of them: in the journal, to be trained or tested on."""
    in_update: int
    """Of those: in the update that would be made next."""
    update: int
    """Training examples of that update."""
    offenders: int
    named: int
    """Of the offenders, how many `eternad review subjects` names before anybody innocent."""
    clean_batches: int
    clean_held: int
    """Clean batches of which more than 1 % waits for another reason than that a subject is new."""
    cpu_seconds: float


def prepare(directory: Path, seed: int, model: Model | None = None) -> Site:
    """Content, a week of players, and the sleepers' one good deed each, all of it learned."""
    site, world = Site(directory, model), World(seed)
    lore = [{"prompt": asked, "completion": answer} for asked, answer in LORE]
    site.drop("content/npc/lore.jsonl", lore, NOW - 8 * DAY)
    # everybody's first record waits in probation; the week after it is what the channel's past consists of
    known = [world.rated(f"h:player{n:08d}", world.sentence(), world.sentence(), good=True) for n in range(SUBJECTS)]
    known += [world.rated(f"h:sleeper{n:08d}", world.sentence(), world.sentence(), good=True) for n in range(SLEEPERS)]
    site.batch("first", known, NOW - 8 * DAY)
    for day in range(6):
        rows = [world.clean() for _ in range(PAST_RECORDS // 6)]
        site.batch(f"past-{day}", rows, NOW - (6.5 - day) * DAY)
    with transaction(site.database) as connection:
        connection.execute("UPDATE example SET state = 'consumed', update_number = 1 WHERE split <> 'eval'")
    return site


def attack(directory: Path, name: str, seed: int, scale: float = 1.0) -> Result:
    """One attack on a copy of a prepared library."""
    began = time.process_time()
    site, world, sleepers = Site(directory), World(1000 + seed), seed % 2 == 1
    subjects = [f"h:{'sleeper' if sleepers else 'villain'}{n:08d}" for n in range(SLEEPERS)]
    clean = [
        site.batch(f"clean-{n}", [world.clean() for _ in range(BATCH_RECORDS)], NOW + n) for n in range(CLEAN_BATCHES)
    ]
    rows = list(ATTACKS[name](world, subjects, scale))
    site.batch("attack", rows, NOW + 10)
    clean += [
        site.batch(f"after-{n}", [world.clean() for _ in range(BATCH_RECORDS)], NOW + 7200 + n)
        for n in range(CLEAN_BATCHES)
    ]
    evil = {row["subject"]["id"] for row in rows} & set(subjects)
    with transaction(site.database) as connection:
        create(connection, "npc", "manual", None, 2000, share_of(site.config.trust))
    learned = _count(site, evil, "state <> 'retracted' AND ingested_at > ?", NOW)
    in_update = _count(site, evil, "state = 'claimed' AND split = 'train' AND ingested_at > ?", NOW)
    whole = site.database.execute("SELECT count(*) FROM example WHERE state = 'claimed' AND split = 'train'").fetchone()
    suspects = [subject for _, subject, _, _ in records.suspects(site.database, "npc", len(evil))]
    site.database.close()
    return Result(
        attack=name, seed=seed, sleepers=sleepers, records=sum(row["subject"]["id"] in evil for row in rows),
        believed=learned, in_update=in_update, update=whole[0], offenders=len(evil), named=len(evil & set(suspects)),
        clean_batches=len(clean), clean_held=sum(each.held > 0.01 * each.records for each in clean),
        cpu_seconds=round(time.process_time() - began, 1),
    )  # fmt: skip


def _count(site: Site, subjects: set[str], where: str, *parameters: object) -> int:
    wanted = msgspec.json.encode(sorted(subjects)).decode()
    row = site.database.execute(
        f"SELECT count(*) FROM example WHERE {where} AND subject IN (SELECT value FROM json_each(?))",
        (*parameters, wanted),
    ).fetchone()
    return int(row[0])


def main() -> None:
    """All attacks with all seeds, or those that were asked for; one line of JSON each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="so many of each attack")
    parser.add_argument("--scale", type=float, default=1.0, help="1: as large as the attacks are meant")
    parser.add_argument("--train", type=Path, help="a base model: train and judge what is let through")
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eternad-poison-") as place:
        prepared = Path(place) / "prepared"
        prepare(prepared, 0).database.close()
        for name in chosen.attacks:
            for seed in range(chosen.seeds):
                directory = Path(place) / "attacked"
                shutil.copytree(prepared, directory)
                result = attack(directory, name, seed, chosen.scale)
                print(json.dumps(msgspec.to_builtins(result)), flush=True)
                if chosen.train is not None and result.in_update:
                    learned = poison_update.learn(directory, chosen.train)
                    print(json.dumps(msgspec.to_builtins(learned)), flush=True)
                shutil.rmtree(directory)


if __name__ == "__main__":
    main()
