"""The journal: each example once, a hold-out fixed at ingest, claimed and consumed by runs."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffers import claims, experience, journal
from buffers.example import Example, Message, Origin, canonical, content_hash, parse
from buffers.experience import Recipe
from buffers.policy import Buffer
from buffers.replay_buffer import members
from daemon.state.database import open_database, transaction

HERE = Origin(file="content/npc/a.jsonl", line=1)


def fact(number: int, prompt: str = "") -> Example:
    return Example(shape="demonstration", prompt=prompt or f"question {number}", completion=f"answer {number}")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = open_database(tmp_path / "eternad.db")
    yield connection
    connection.close()


def fill(database: sqlite3.Connection, numbers: range, *, fraction: float = 0.1, now: float = 0.0) -> journal.Added:
    with transaction(database) as connection:
        return journal.add(connection, "npc", [(fact(n), HERE) for n in numbers], heldout_fraction=fraction, now=now)


def learn(database: sqlite3.Connection, run: str, update: int, numbers: range) -> None:
    fill(database, numbers)
    with transaction(database) as connection:
        claims.claim(connection, "npc", run, 10_000)
        claims.consume(connection, run, update)


texts = st.text(min_size=1, max_size=20)
prompts = st.one_of(texts, st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), texts)).map(tuple))


@given(st.builds(Example, shape=st.just("demonstration"), completion=texts, prompt=prompts))
def test_the_canonical_form_is_faithful(example: Example) -> None:
    """What is read back is what was stored, and equal examples have equal hashes."""
    assert parse(canonical(example)) == example
    assert content_hash(parse(canonical(example))) == content_hash(example)


def test_a_copy_is_counted_not_stored(database: sqlite3.Connection) -> None:
    """The same example from another file is a duplicate of the first."""
    assert fill(database, range(5)).new == 5
    again = fill(database, range(3, 8))
    assert (again.new, again.duplicates) == (3, 2)
    assert journal.counts(database, "npc") == {"heldout/pending": 1, "train/pending": 7}


def test_the_holdout_takes_its_fraction_of_every_batch(database: sqlite3.Connection) -> None:
    """Ten examples at 0.1 always give one; so do the next ten; a copy never changes sides."""
    for start in range(0, 50, 10):
        assert fill(database, range(start, start + 10)).heldout == 1
    assert fill(database, range(50)).heldout == 0


def test_examples_that_ask_the_same_stay_on_one_side(database: sqlite3.Connection) -> None:
    """The answer to a held-out question never reaches training by way of another phrasing of the answer."""
    items = [(fact(n, prompt=f"question {n % 20}"), HERE) for n in range(400)]
    with transaction(database) as connection:
        journal.add(connection, "npc", items, heldout_fraction=0.2)
    rows = database.execute("SELECT count(DISTINCT split) FROM example GROUP BY prompt_hash").fetchall()
    assert len(rows) == 20
    assert set(rows) == {(1,)}


def test_eval_files_are_never_trained(database: sqlite3.Connection) -> None:
    """An example dropped into eval/ is neither pending nor claimed."""
    with transaction(database) as connection:
        journal.add(connection, "npc", [(fact(1), HERE)], heldout_fraction=0.5, split="eval")
        assert claims.pending(connection, "npc").train == 0
        assert claims.claim(connection, "npc", "run", 10) == 0


def test_a_failed_run_releases_and_three_failures_set_aside(database: sqlite3.Connection) -> None:
    """Nothing is lost by a failure, and nothing blocks the model for ever."""
    fill(database, range(10))
    for attempt in range(3):
        with transaction(database) as connection:
            assert claims.claim(connection, "npc", f"run-{attempt}", 100) == 9
            rejected = claims.release(connection, f"run-{attempt}", attempts_max=3)
        assert rejected == (10 if attempt == 2 else 0)
    assert claims.pending(database, "npc").train == 0
    with transaction(database) as connection:
        assert claims.requeue(connection, "run-2") == 10
    assert claims.pending(database, "npc").train == 9


def test_claims_take_the_oldest_first_and_leave_the_rest(database: sqlite3.Connection) -> None:
    """A limit splits a large drop into several updates without losing or sharing an example."""
    fill(database, range(100))
    with transaction(database) as connection:
        assert claims.claim(connection, "npc", "a", 40) == 40
        assert claims.claim(connection, "npc", "b", 1000) == 50
    runs = database.execute("SELECT run_id, min(id), max(id) FROM example GROUP BY run_id ORDER BY 2").fetchall()
    assert [row[0] for row in runs] == ["a", "b"]
    assert runs[0][2] < runs[1][1]


def test_an_experience_has_the_exact_share_of_replay(database: sqlite3.Connection, tmp_path: Path) -> None:
    """n = r / (1 - r) x new; what the buffer cannot give is reported, not hidden."""
    learn(database, "old", 1, range(100))
    fill(database, range(100, 150))
    with transaction(database) as connection:
        claims.claim(connection, "npc", "new", 1000)
    path = tmp_path / "experience.jsonl"
    cut = experience.cut(database, "npc", "new", 2, Recipe(replay_ratio=0.4), path)
    rows = list(experience.read(path))
    assert cut.rows["new"] == 45
    assert cut.rows["replay"] == cut.replay_wanted == 30
    assert cut.replay_ratio == pytest.approx(0.4)
    assert {row.update for row in rows if row.role == "new"} == {2}
    assert {row.update for row in rows if row.role in ("replay", "heldout_old")} == {1}
    short = experience.cut(database, "npc", "new", 2, Recipe(replay_ratio=0.8, buffer=Buffer(examples=20)), path)
    assert (short.rows["replay"], short.replay_wanted) == (20, 180)
    over_epochs = experience.cut(database, "npc", "new", 2, Recipe(replay_ratio=0.4, epochs=2), path)
    assert (over_epochs.rows["replay"], over_epochs.replay_wanted) == (60, 30)
    assert over_epochs.replay_ratio == pytest.approx(0.4)


def test_an_experience_never_trains_on_a_holdout(database: sqlite3.Connection, tmp_path: Path) -> None:
    """The trained, the rehearsed and the tested examples have no prompt in common."""
    learn(database, "old", 1, range(100))
    fill(database, range(100, 200))
    with transaction(database) as connection:
        claims.claim(connection, "npc", "new", 1000)
    recipe = Recipe(replay_ratio=0.5, memory_updates=3, memory_examples=50)
    experience.cut(database, "npc", "new", 2, recipe, tmp_path / "e")
    rows = list(experience.read(tmp_path / "e"))
    trained = {row.example.prompt for row in rows if row.role in ("new", "replay", "memory")}
    tested = {row.example.prompt for row in rows if row.role in ("heldout_new", "heldout_old")}
    assert trained
    assert tested
    assert not trained & tested


def test_the_same_cut_twice_is_the_same_file(database: sqlite3.Connection, tmp_path: Path) -> None:
    """A run that is begun again after a crash learns from exactly the same rows."""
    learn(database, "old", 1, range(100))
    fill(database, range(100, 150))
    with transaction(database) as connection:
        claims.claim(connection, "npc", "new", 1000)
    first = experience.cut(database, "npc", "new", 2, Recipe(replay_ratio=0.4), tmp_path / "1")
    second = experience.cut(database, "npc", "new", 2, Recipe(replay_ratio=0.4), tmp_path / "2")
    assert first == second
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_the_buffer_is_a_bounded_uniform_reservoir(database: sqlite3.Connection) -> None:
    """Over many journals, early and late examples are kept equally often (within 4 standard errors)."""
    learn(database, "old", 1, range(4000))
    kept = set(members(database, "npc", Buffer(examples=1000)))
    assert len(kept) == 1000
    early = sum(identity <= 2000 for identity in kept)
    assert abs(early - 500) < 4 * (1000 * 0.25) ** 0.5


def test_what_a_rolled_back_version_taught_is_not_rehearsed(database: sqlite3.Connection) -> None:
    """Set aside with its version, and back with it."""
    learn(database, "run", 1, range(20))
    assert len(members(database, "npc", Buffer(examples=100))) == 18
    with transaction(database) as connection:
        claims.set_aside(connection, "run")
    assert members(database, "npc", Buffer(examples=100)) == []
    with transaction(database) as connection:
        claims.restore(connection, "run")
    assert len(members(database, "npc", Buffer(examples=100))) == 18


def test_a_retracted_record_is_neither_trained_nor_rehearsed(database: sqlite3.Connection) -> None:
    """A player's retraction takes effect on what waits and on what was learned."""
    with transaction(database) as connection:
        origin = Origin(file="feedback/npc/game/1.jsonl", line=3, record_id="01J")
        journal.add(connection, "npc", [(fact(1), origin)], heldout_fraction=0.0)
        assert journal.retract(connection, "npc", "01J") == 1
        assert claims.claim(connection, "npc", "run", 10) == 0


def test_general_text_is_rehearsed_or_probed_never_both(database: sqlite3.Connection, tmp_path: Path) -> None:
    """Drift is measured on text that no update has trained on or was anchored to, the same at every update."""
    general = tmp_path / "general"
    general.mkdir()
    (general / "a.txt").write_text("\n\n".join(f"Paragraph number {n} about the weather." for n in range(200)))
    probes = []
    for update in (1, 2):
        fill(database, range(update * 100, update * 100 + 50))
        with transaction(database) as connection:
            claims.claim(connection, "npc", f"run-{update}", 1000)
        recipe = Recipe(general_ratio=0.5, general_directory=general)
        experience.cut(database, "npc", f"run-{update}", update, recipe, tmp_path / "e")
        rows = list(experience.read(tmp_path / "e"))
        probes.append({row.example.completion for row in rows if row.role == "probe"})
        assert len([row for row in rows if row.role == "general"]) == 45
        assert not probes[-1] & {row.example.completion for row in rows if row.role == "general"}
    assert probes[0] == probes[1]
    assert len(probes[0]) == 16
