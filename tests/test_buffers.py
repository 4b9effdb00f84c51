"""Who stays in the replay buffer: one contract over all policies, then what each is for."""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from buffers import claims, experience, journal, rehearsal
from buffers.example import Example, Origin, parse
from buffers.experience import Recipe
from buffers.inventory import composition, held
from buffers.policy import Buffer, Past
from buffers.replay_buffer import POLICIES, members
from buffers.similarity import distance, vector
from daemon.state.database import open_database, transaction

DAY = 86400.0
every_policy = pytest.mark.parametrize("policy", POLICIES)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = open_database(tmp_path / "eternad.db")
    yield connection
    connection.close()


def learn(
    database: sqlite3.Connection, update: int, rows: range, *, collection: str = "", subjects: int = 0, now: float = 0.0
) -> None:
    """Take in and learn one example per number of `rows`, given by so many subjects in turn."""
    items = [
        (
            Example(shape="demonstration", prompt=f"question {row}", completion=f"answer {row}"),
            Origin(file="a.jsonl", collection=collection, subject=f"s{row % subjects}" if subjects else None),
        )
        for row in rows
    ]
    with transaction(database) as connection:
        journal.add(connection, "npc", items, heldout_fraction=0.0, now=now)
        claims.claim(connection, "npc", f"run-{update}", 10_000)
        claims.consume(connection, f"run-{update}", update)


def buffer(policy: str, **keys: object) -> Buffer:
    return Buffer(**{"policy": policy, "examples": 20, **keys})  # type: ignore[arg-type]


def column(database: sqlite3.Connection, name: str, ids: list[int]) -> list[object]:
    """One value per row of the journal."""
    return [database.execute(f"SELECT {name} FROM example WHERE id = ?", (row,)).fetchone()[0] for row in ids]


def set_losses(database: sqlite3.Connection, losses: dict[int, float]) -> None:
    with transaction(database) as connection:
        journal.remember_losses(connection, losses.items())


def set_tokens(database: sqlite3.Connection, tokens: dict[int, int]) -> None:
    with transaction(database) as connection:
        journal.remember_tokens(connection, tokens.items())


@every_policy
def test_a_buffer_is_bounded_and_holds_each_example_once(database: sqlite3.Connection, policy: str) -> None:
    """Whatever was learned, it has at most `examples` places, and fills them while there is something to fill with."""
    learn(database, 1, range(12), collection="a")
    assert sorted(members(database, "npc", buffer(policy))) == list(range(1, 13))
    learn(database, 2, range(12, 90), collection="b")
    kept = members(database, "npc", buffer(policy))
    assert len(kept) == len(set(kept)) == 20


@every_policy
def test_the_same_buffer_comes_out_every_time(database: sqlite3.Connection, tmp_path: Path, policy: str) -> None:
    """Asked twice, and from a journal that was filled anew: the seed is in the content."""
    again = open_database(tmp_path / "again.db")
    for connection in (database, again):
        learn(connection, 1, range(50), collection="a", subjects=30)
        learn(connection, 2, range(50, 90), collection="b")
        set_losses(connection, {row: row % 7 for row in range(1, 90)})
    wanted = buffer(policy, subject_share=0.05)
    assert members(database, "npc", wanted) == members(database, "npc", wanted) == members(again, "npc", wanted)
    again.close()


@every_policy
def test_a_smaller_buffer_is_the_start_of_a_larger_one(database: sqlite3.Connection, policy: str) -> None:
    """Resizing is another number: shrinking drops the least worthy, growing brings the same ones back."""
    learn(database, 1, range(60), collection="a")
    learn(database, 2, range(60, 90), collection="b")
    set_losses(database, {row: row % 7 for row in range(1, 60)})
    larger = members(database, "npc", buffer(policy, examples=50))
    assert members(database, "npc", buffer(policy, examples=15)) == larger[:15]


@every_policy
def test_only_what_was_learned_and_still_stands_is_in_a_buffer(database: sqlite3.Connection, policy: str) -> None:
    """Not what waits, not the hold-out, not another model's, not what a rolled-back version taught."""
    learn(database, 1, range(10))
    learn(database, 2, range(10, 20))
    foreign = [(Example(shape="text", completion="another model's"), Origin(file="b"))]
    waiting = [(Example(shape="text", completion=f"text {row}"), Origin(file="c")) for row in range(9)]
    with transaction(database) as connection:
        journal.add(connection, "book", foreign, heldout_fraction=0.0)
        journal.add(connection, "npc", waiting, heldout_fraction=0.3)
        claims.set_aside(connection, "run-2")
    assert sorted(members(database, "npc", buffer(policy))) == list(range(1, 11))


@every_policy
def test_no_subject_fills_a_buffer(database: sqlite3.Connection, policy: str) -> None:
    """One talkative player has its share of the places, at least one; examples of nobody have no cap."""
    learn(database, 1, range(60), subjects=3)
    learn(database, 2, range(60, 70))
    kept = members(database, "npc", buffer(policy, examples=40, subject_share=0.05))
    assert Counter(column(database, "subject", kept)) == {"s0": 2, "s1": 2, "s2": 2, None: 10}
    single = members(database, "npc", buffer(policy, examples=40))
    assert Counter(column(database, "subject", single)) == {"s0": 1, "s1": 1, "s2": 1, None: 10}


@every_policy
def test_what_is_too_old_is_not_rehearsed(database: sqlite3.Connection, policy: str) -> None:
    """Counted back from the newest example, so that the clock changes nothing between two cuts."""
    learn(database, 1, range(10), now=0.0)
    learn(database, 2, range(10, 20), now=10 * DAY)
    assert sorted(members(database, "npc", buffer(policy, ttl_seconds=5 * DAY))) == list(range(11, 21))
    assert len(members(database, "npc", buffer(policy, ttl_seconds=11 * DAY))) == 20


@every_policy
def test_an_experience_replays_from_its_policy_twice_the_same(
    database: sqlite3.Connection, tmp_path: Path, policy: str
) -> None:
    """A run that is begun again after a crash rehearses the same rows, also when others came in meanwhile."""
    learn(database, 1, range(60))
    items = [(Example(shape="text", completion=f"new {row}"), Origin(file="c")) for row in range(20)]
    recipe = Recipe(replay_ratio=0.5, buffer=buffer(policy, ttl_seconds=DAY))
    with transaction(database) as connection:
        journal.add(connection, "npc", items, heldout_fraction=0.0, now=DAY)
        claims.claim(connection, "npc", "run", 100)
    first = experience.cut(database, "npc", "run", 2, recipe, tmp_path / "1")
    with transaction(database) as connection:
        late = [(Example(shape="text", completion="late"), Origin(file="d"))]
        journal.add(connection, "npc", late, heldout_fraction=0.0, now=9 * DAY)
    assert experience.cut(database, "npc", "run", 2, recipe, tmp_path / "2") == first
    replayed = [row.id for row in experience.read(tmp_path / "1") if row.role == "replay"]
    assert sorted(replayed) == sorted(members(database, "npc", recipe.buffer, "run"))


@every_policy
@pytest.mark.parametrize("bound", ["tokens", "bytes"])
def test_a_buffer_keeps_within_its_tokens_and_bytes(database: sqlite3.Connection, policy: str, bound: str) -> None:
    """As many of the same examples in the same order as fit, and the next one would not."""
    learn(database, 1, range(30), collection="a")
    learn(database, 2, range(30, 60), collection="b")
    set_tokens(database, {row: 5 + row % 9 for row in range(1, 61)})
    measure = {"tokens": "tokens", "bytes": "length(body)"}[bound]
    free = members(database, "npc", buffer(policy, examples=50))
    sizes = [int(str(size)) for size in column(database, measure, free)]
    wanted = sum(sizes[:12]) + sizes[12] // 2
    assert members(database, "npc", buffer(policy, examples=50, **{bound: wanted})) == free[:12]


@every_policy
def test_an_example_that_no_empty_buffer_could_hold_blocks_nothing(database: sqlite3.Connection, policy: str) -> None:
    """It is passed over; the others have their places."""
    learn(database, 1, range(20))
    first = members(database, "npc", buffer(policy))[0]
    set_tokens(database, {row: 1000 if row == first else 5 for row in range(1, 21)})
    assert len(members(database, "npc", buffer(policy, tokens=95))) == 19


def test_before_a_trainer_has_counted_tokens_are_guessed_from_bytes(database: sqlite3.Connection) -> None:
    """Journals of earlier programs have no counts."""
    learn(database, 1, range(20))
    (size,) = set(column(database, "length(body)", list(range(1, 11))))
    assert len(members(database, "npc", buffer("reservoir", tokens=3 * (int(str(size)) // 4 + 1) + 3))) == 3


def test_a_rebase_takes_the_whole_buffer(database: sqlite3.Connection, tmp_path: Path) -> None:
    """Whatever share an ordinary experience replays; nothing is short."""
    learn(database, 1, range(60))
    with transaction(database) as connection:
        items = [(Example(shape="text", completion=f"new {row}"), Origin(file="c")) for row in range(5)]
        journal.add(connection, "npc", items, heldout_fraction=0.0)
        claims.claim(connection, "npc", "run", 100)
    recipe = Recipe(replay_ratio=0.2, whole_buffer=True, buffer=buffer("reservoir"))
    cut = experience.cut(database, "npc", "run", 2, recipe, tmp_path / "1")
    assert (cut.rows, cut.replay_wanted) == ({"new": 5, "replay": 20}, 20)
    replayed = [row.id for row in experience.read(tmp_path / "1") if row.role == "replay"]
    assert replayed == sorted(members(database, "npc", recipe.buffer))


@every_policy
def test_what_people_are_shown_is_what_is_rehearsed(database: sqlite3.Connection, policy: str) -> None:
    """`eternad buffer show` and `export` ask the same policy."""
    learn(database, 1, range(30))
    learn(database, 2, range(30, 60))
    kept = members(database, "npc", buffer(policy))
    ages = composition(database, "npc", buffer(policy))
    assert {age.update: age.held for age in ages} == {
        number: sum((row > 30) == (number == 2) for row in kept) for number in (1, 2)
    }
    assert [age.learned for age in ages] == [30, 30]
    assert len(list(held(database, "npc", buffer(policy)))) == 20


def test_the_reservoir_is_uniform_over_time(database: sqlite3.Connection) -> None:
    """Early and late examples are kept equally often (within 4 standard errors)."""
    learn(database, 1, range(2000))
    learn(database, 2, range(2000, 4000))
    early = sum(row <= 2000 for row in members(database, "npc", buffer("reservoir", examples=1000)))
    assert abs(early - 500) < 4 * (1000 * 0.25) ** 0.5


def test_a_new_example_evicts_at_most_one_from_the_reservoir(database: sqlite3.Connection) -> None:
    """And what was once evicted never comes back: a model is not asked to rehearse what it was let forget."""
    learn(database, 1, range(30))
    gone: set[int] = set()
    for update in range(2, 40):
        before = set(members(database, "npc", buffer("reservoir")))
        learn(database, update, range(28 + update, 29 + update))
        after = set(members(database, "npc", buffer("reservoir")))
        assert len(before - after) <= 1
        gone |= before - after
        assert not gone & after


def test_the_ring_keeps_the_latest(database: sqlite3.Connection) -> None:
    """The last update first, and the end of it before its beginning."""
    learn(database, 1, range(30))
    learn(database, 2, range(30, 45))
    assert members(database, "npc", buffer("ring")) == [*range(45, 30, -1), *range(30, 25, -1)]


def test_the_balanced_buffer_gives_every_group_the_same(database: sqlite3.Connection) -> None:
    """A small collection is kept whole beside a large one, and the others share what it leaves."""
    for update, (name, rows) in enumerate({"a": range(70), "b": range(70, 90), "c": range(90, 94)}.items(), start=1):
        learn(database, update, rows, collection=name)
    kept = members(database, "npc", buffer("balanced"))
    assert Counter(column(database, "collection", kept)) == {"a": 8, "b": 8, "c": 4}


@pytest.mark.parametrize("key", ["collection", "source", "subject", "shape"])
def test_a_buffer_can_be_balanced_by(database: sqlite3.Connection, key: str) -> None:
    """Every key that the configuration allows is a column of the journal."""
    learn(database, 1, range(5))
    assert len(members(database, "npc", buffer("balanced", balance_by=key))) == 5


def test_surprise_takes_the_highest_losses_and_a_sample(database: sqlite3.Connection) -> None:
    """Half of the places go to the hardest examples, half to the reservoir's; without losses it is the reservoir."""
    learn(database, 1, range(200))
    plain = members(database, "npc", buffer("reservoir"))
    assert set(members(database, "npc", buffer("surprise"))) == set(plain)
    set_losses(database, {row: row / 100 for row in range(1, 151)})
    kept = members(database, "npc", buffer("surprise"))
    assert set(range(141, 151)) <= set(kept)
    assert set(plain[:10]) <= set(kept)
    hardest = members(database, "npc", buffer("surprise", uniform_share=0.0))
    assert hardest == list(range(150, 130, -1))
    assert members(database, "npc", buffer("surprise", uniform_share=1.0)) == plain


def taught(database: sqlite3.Connection, update: int, sentences: list[str]) -> None:
    """Learn texts."""
    items = [(Example(shape="text", completion=sentence), Origin(file="a")) for sentence in sentences]
    with transaction(database) as connection:
        journal.add(connection, "npc", items, heldout_fraction=0.0)
        claims.claim(connection, "npc", f"run-{update}", 10_000)
        claims.consume(connection, f"run-{update}", update)


def test_similarity_rehearses_what_is_least_like_the_new(database: sqlite3.Connection) -> None:
    """Of two past subjects the one that comes again gives way to the other, in proportion to their distances."""
    rivers = [f"the river number {row} flows to the southern sea" for row in range(300)]
    clocks = [f"every clock of tower {row} strikes thirteen at noon" for row in range(300)]
    taught(database, 1, rivers)
    taught(database, 2, clocks)
    with transaction(database) as connection:
        new = [(Example(shape="text", completion=f"a river called {row} flows to the sea"), Origin(file="b"))
               for row in range(20)]  # fmt: skip
        journal.add(connection, "npc", new, heldout_fraction=0.0)
        claims.claim(connection, "npc", "run-3", 100)
    kept = members(database, "npc", buffer("similarity", examples=100), "run-3")
    held = Counter(column(database, "update_number", kept))
    assert held[2] > 1.5 * held[1] > 0
    past = Past(database, "npc", run_id="run-3")
    new_ones, first, second = (
        vector(map(parse, bodies)) for bodies in (past.new_bodies(32), past.bodies_of(1, 32), past.bodies_of(2, 32))
    )
    near, far = distance(new_ones, first), distance(new_ones, second)
    # the expected share of an update in a weighted sample of a sixth lies between equal parts and far / (near + far)
    assert 0.5 < held[2] / 100 <= far / (near + far) + 0.1


def test_what_is_as_far_as_everything_else_is_a_plain_reservoir(database: sqlite3.Connection) -> None:
    """With one past update the keys are in the order of the weights."""
    learn(database, 1, range(60))
    assert members(database, "npc", buffer("similarity")) == members(database, "npc", buffer("reservoir"))


def test_a_rehearsed_past_keeps_what_the_policies_go_by(database: sqlite3.Connection) -> None:
    """Losses and tokens are in the copy that a search plays with: its buffer is the model's."""
    learn(database, 1, range(40))
    set_losses(database, {row: row % 7 for row in range(1, 41)})
    set_tokens(database, dict.fromkeys(range(1, 41), 9))
    wanted = buffer("surprise", tokens=100)
    with rehearsal.rehearsal(database, "npc", [1]) as copy:
        rehearsal.end(copy, 1)
        assert members(copy, "npc", wanted) == members(database, "npc", wanted)
        assert len(members(copy, "npc", wanted)) == 11
