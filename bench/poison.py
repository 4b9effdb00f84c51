"""`make bench-poison`: fifty seeded attacks through the real intake, and what trust lets through of them.

Each attack comes into a library that has had writers' content and a week of players before, beside a day's clean
feedback. In half of them the attackers are new accounts, in the other half "sleepers" who have behaved for days. Said
is how many examples of the attack could be learned at all, how many are in the update that would be made next, whether
the offenders are named, and how many clean batches are held beside them. With `--train` an update that has any of the
attackers' examples is trained and judged (`bench.poison_update`); one that has none is the one without the attack.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import msgspec

from bench import poison_update
from bench.poison_world import ATTACKS, DAY, LORE, SLEEPERS, SUBJECTS, Record, World
from bench.site import Site
from daemon import review
from daemon.config import Model
from daemon.state import records
from daemon.state.database import transaction
from daemon.state.runs import create
from daemon.state.waiting import share_of
from daemon.trust.policy import Trust

NOW = 1_800_000_000.0
BATCH_RECORDS = 250
CLEAN_BATCHES = 4
PAST_RECORDS = 1500


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one attack."""

    attack: str
    seed: int
    sleepers: bool
    records: int
    """Of the attackers."""
    believed: int
    """Of them: in the journal when they had come in."""
    held_before_update: int
    """Records, of whomever, that looked like a backdoor when the update was about to begin."""
    in_update: int
    """Of those: in the update that would be made next."""
    update: int
    """Training examples of that update."""
    offenders: int
    named: int
    """Of the offenders, how many `eternad review subjects` names before anybody innocent."""
    clean_batches: int
    clean_held: int
    """Clean batches of which more than 1 % waits when the update begins, for another reason than a new subject."""
    clean_records_held: int
    """Of all of them."""
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


def attack(directory: Path, name: str, seed: int, scale: float = 1.0, trust: Trust | None = None) -> Result:
    """One attack on a copy of a prepared library, up to the moment at which an update would begin."""
    began = time.process_time()
    site, world, sleepers = Site(directory, trust=trust or Trust()), World(1000 + seed), seed % 2 == 1
    subjects = [f"h:{'sleeper' if sleepers else 'villain'}{n:08d}" for n in range(SLEEPERS)]
    clean = [[world.clean() for _ in range(BATCH_RECORDS)] for _ in range(2 * CLEAN_BATCHES)]
    rows = list(ATTACKS[name](world, subjects, scale))
    for number, batch in enumerate(clean[:CLEAN_BATCHES]):
        site.batch(f"clean-{number}", batch, NOW + number)
    site.batch("attack", rows, NOW + 10)
    for number, batch in enumerate(clean[CLEAN_BATCHES:]):
        site.batch(f"after-{number}", batch, NOW + 7200 + number)
    evil = {row["subject"]["id"] for row in rows} & set(subjects)
    believed = _count(site, evil, "state <> 'retracted' AND ingested_at > ?", NOW)
    with transaction(site.database) as connection:
        stopped = review.hold_associations(connection, site.config.trust, "npc")
        create(connection, "npc", "manual", None, 2000, share_of(site.config.trust))
    in_update = _count(site, evil, "state = 'claimed' AND split = 'train' AND ingested_at > ?", NOW)
    whole = site.database.execute("SELECT count(*) FROM example WHERE state = 'claimed' AND split = 'train'").fetchone()
    suspects = [subject for _, subject, _, _ in records.suspects(site.database, "npc", len(evil))]
    held = [_held(site, batch) for batch in clean]
    site.database.close()
    return Result(
        attack=name, seed=seed, sleepers=sleepers, records=sum(row["subject"]["id"] in evil for row in rows),
        believed=believed, held_before_update=stopped, in_update=in_update, update=whole[0], offenders=len(evil),
        named=len(evil & set(suspects)), clean_batches=len(clean),
        clean_held=sum(count > 0.01 * BATCH_RECORDS for count in held), clean_records_held=sum(held),
        cpu_seconds=round(time.process_time() - began, 1),
    )  # fmt: skip


def _held(site: Site, batch: list[Record]) -> int:
    """How many records of a batch wait for review, those of new subjects left out."""
    wanted = msgspec.json.encode([row["id"] for row in batch]).decode()
    row = site.database.execute(
        "SELECT count(*) FROM record WHERE state = 'held' AND code <> 'probation'"
        " AND id IN (SELECT value FROM json_each(?))",
        (wanted,),
    ).fetchone()
    return int(row[0])


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
    parser.add_argument("--unguarded", action="store_true", help="without the look at associations before the update")
    parser.add_argument("--first", type=int, default=0, help="the first seed; odd ones are of old accounts")
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    chosen = parser.parse_args()
    trust = Trust(association_records_min=0) if chosen.unguarded else Trust()
    with tempfile.TemporaryDirectory(prefix="eternad-poison-") as place:
        prepared = Path(place) / "prepared"
        prepare(prepared, 0).database.close()
        for name in chosen.attacks:
            for seed in range(chosen.first, chosen.first + chosen.seeds):
                directory = Path(place) / "attacked"
                shutil.copytree(prepared, directory)
                result = attack(directory, name, seed, chosen.scale, trust)
                print(json.dumps(msgspec.to_builtins(result)), flush=True)
                if chosen.train is not None and result.in_update:
                    learned = poison_update.learn(directory, chosen.train, name)
                    print(json.dumps(msgspec.to_builtins(learned)), flush=True)
                shutil.rmtree(directory)


if __name__ == "__main__":
    main()
