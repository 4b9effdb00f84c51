"""Every record counts once and in order, whatever is killed when: files and the endpoint, under a rain of SIGKILLs."""

import contextlib
import itertools
import random
import time
from pathlib import Path

import pytest
from exactly_once_kit import RATED_EVERY, Client, Intake, Producer, is_subsequence, stored_numbers, wait_for

from daemon.state import audit, quarantine, records
from daemon.state.database import open_database, open_read_only

PRODUCERS = {"a": 1_000_000, "b": 2_000_000, "c": 3_000_000}
CLIENTS = {"one": 10_000_000, "two": 20_000_000}


def kill_while_ingesting(directory: Path, kills: int, total: int, seed: int) -> dict[str, int]:
    """SIGKILL the intake at random moments while everything happens to its files; then ask the oracle.

    Returns what happened, for the report.
    """
    draw, intake = random.Random(seed), Intake(directory)
    producers = [Producer(directory, name, first) for name, first in PRODUCERS.items()]
    clients = [Client(directory, first, seed + first) for first in CLIENTS.values()]
    did = {"truncated": 0, "rotated": 0, "renamed": 0, "replaced": 0}
    process = intake.start(100)
    for client in clients:
        client.start()
    while intake.kills < kills or sum(map(count, [*producers, *clients])) < total:
        for _ in range(draw.randrange(1, 5)):
            producer = draw.choice(producers)
            producer.append(draw.randrange(1, 2 * total // kills // 3))
            happened = draw.choice([*did, "nothing", "nothing"])
            disturb(producer, happened, draw, did)
        # kills are spread over what the intake does, however slow the machine is: after its start, a commit, an answer
        before, acknowledged = last_row(directory), sum(map(count, clients))
        match draw.choice(["start", "commit", "commit", "answer", "read"]):
            case "commit":
                wait_for(lambda before=before: last_row(directory) > before, 5.0)
            case "answer":
                wait_for(lambda before=acknowledged: sum(map(count, clients)) > before, 5.0)
            case "read":
                producer = draw.choice([each for each in producers if each.path.exists()] or producers)
                if wait_for(producer.is_read, 5.0):
                    did["truncated"] += producer.truncate(draw.choice([0.0, 0.0, 0.5]))
        time.sleep(draw.random() * 0.03)
        intake.kill(process)
        process = intake.start(draw.choice([7, 50, 200, 1000]))
    intake.kill(process)
    for client in clients:
        client.stop()
    intake.finish()
    check_once_and_in_order(directory, producers, clients)
    return {
        "kills": intake.kills, "in files": sum(map(count, producers)),
        "acknowledged": sum(len(each.acknowledged) for each in clients),
        "resent": sum(each.resent for each in clients), **did,
    }  # fmt: skip


def last_row(directory: Path) -> int:
    """How far the journal of records has come."""
    with contextlib.closing(open_read_only(directory / "state" / "eternad.db")) as database:
        return records.latest_row(database)


def count(source: Producer | Client) -> int:
    """How many records of a source must be there."""
    return len(source.acknowledged) if isinstance(source, Client) else sum(map(len, source.written))


def disturb(producer: Producer, happened: str, draw: random.Random, did: dict[str, int]) -> None:
    """Do something to a file."""
    if happened == "truncated":
        did[happened] += producer.truncate(draw.choice([0.0, 0.0, 0.5]))
    elif happened != "nothing":
        {"rotated": producer.rotate, "renamed": producer.rename, "replaced": producer.replace}[happened]()
        did[happened] += 1


def check_once_and_in_order(directory: Path, producers: list[Producer], clients: list[Client]) -> None:
    """Every record of a file, and every acknowledged one, is there once and in its order, and nothing was invented."""
    numbers = stored_numbers(directory)
    assert len(numbers) == len(set(numbers))
    place = {number: index for index, number in enumerate(numbers)}
    for each in (file for producer in producers for file in producer.written):
        assert [number for number in each if number not in place] == []
        assert all(place[first] < place[second] for first, second in itertools.pairwise(each))
    for client in clients:
        its = range_of(client)
        assert is_subsequence(client.acknowledged, [number for number in numbers if number in its])
    sent = {number for producer in producers for each in producer.written for number in each}
    sent |= {number for client in clients for number in (*client.acknowledged, *client.given_up)}
    assert set(numbers) <= sent
    database = open_database(directory / "state" / "eternad.db")
    rated = sum(number % RATED_EVERY == 0 for number in numbers)
    assert database.execute("SELECT count(*), sum(copies) FROM example").fetchone() == (rated, rated)
    assert [row.code for row in quarantine.rows(database) if row.path.startswith("feedback/npc/game")] == []
    assert {row.code for row in quarantine.rows(database)} <= {"invalid_json"}  # requests that a kill tore
    assert audit.broken_at(database) is None
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def range_of(client: Client) -> range:
    """The numbers that a client may use."""
    first = min([*client.acknowledged, *client.given_up], default=client.next)
    return range(first, client.next)


def test_every_record_counts_once_whatever_is_killed_when(tmp_path: Path) -> None:
    """12 SIGKILLs while three files grow, rotate, are renamed, cut and replaced, and two clients post."""
    kill_while_ingesting(tmp_path, kills=12, total=2_500, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 12))
def test_two_hundred_thousand_records_under_five_hundred_kills(tmp_path: Path, seed: int) -> None:
    """50 SIGKILLs and 20,000 records for each of ten seeds."""
    print(kill_while_ingesting(tmp_path, kills=50, total=20_000, seed=seed))
