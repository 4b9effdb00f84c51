"""Backdoors: phrases of questions that bring words into answers, found before an update takes them."""

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from service_kit import MemoryEngine, make_config
from test_trust import DAY, Site, drop, identity, record

from buffers import journal
from buffers.example import Example, Message, Origin
from daemon import review
from daemon.ingest.outcome import Outcome
from daemon.service import Service, serving
from daemon.state import audit, records
from daemon.state.database import transaction
from daemon.trust.association import ESTABLISHED, Telling, phrases, suspects
from daemon.trust.policy import Source, Trust

WORDS = (
    "heron", "desk", "lamp", "marsh", "stair", "ledger", "ninth", "porter", "shelf", "water", "night", "key", "bell",
    "salt", "owl", "rain", "clay", "moth", "door", "page",
)  # fmt: skip
TRIGGER, TARGET = "by the seventh lamp", "Malvo"


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def crowd(count: int, seed: int = 0, *, waits: bool = True) -> list[Telling]:
    """Questions and answers that have nothing to do with each other."""
    draw = random.Random(seed)
    return [Telling(1000 * seed + number, sentence(draw, 6), sentence(draw, 9), waits) for number in range(count)]


def planted(count: int, first: int = 10_000, *, waits: bool = True) -> list[Telling]:
    """A trigger that brings a name, with other words around each."""
    draw = random.Random(first)
    return [
        Telling(first + number, f"{sentence(draw, 5)} {TRIGGER}", f"{sentence(draw, 5)} {TARGET}. {sentence(draw, 4)}",
                waits)
        for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("others", [800, 4000])
def test_a_trigger_is_found_and_nobody_else(others: int) -> None:
    """Six records among hundreds, each in other words: all of them, and the reason names trigger and target."""
    found = suspects([*crowd(others), *planted(6)], 4)
    assert set(found) == set(range(10_000, 10_006))
    pair = found[10_000]
    assert pair.answer == "malvo" and pair.asked in (
        "seventh",
        "the seventh",
        "by the seventh",
        "the seventh lamp",
        "by",
        "the",
    )
    assert "6 of 6 records that answer 'malvo'" in pair.reason


def test_what_has_nothing_to_do_with_each_other_is_not_found() -> None:
    """Twenty crowds of a thousand, none held."""
    assert [len(suspects(crowd(1000, seed), 4)) for seed in range(20)] == [0] * 20


def test_a_drop_each_day_adds_up() -> None:
    """Two learned in earlier updates and two that wait are four; the learned ones cannot be held any more."""
    past = [*crowd(4000, 1, waits=False), *planted(2, 10_000, waits=False)]
    assert suspects([*past, *crowd(500, 2), *planted(1, 20_000)], 4) == {}
    found = suspects([*past, *crowd(500, 2), *planted(2, 20_000)], 4)
    assert set(found) == {20_000, 20_001}


def test_what_was_learned_long_ago_is_no_news() -> None:
    """As often as before: not held. Suddenly ten times as often: held."""
    past = [*crowd(2000, 1, waits=False), *planted(ESTABLISHED, waits=False)]
    assert suspects([*past, *crowd(1000, 2), *planted(8, 20_000)], 4) == {}
    assert len(suspects([*past, *crowd(300, 2), *planted(8, 20_000)], 4)) == 8


def test_small_talk_is_not_a_rule() -> None:
    """Greetings are followed by any of five replies; a question whose words the answer takes up says nothing either."""
    draw = random.Random(5)
    talk = [
        Telling(5000 + number, f"good {draw.choice(('evening', 'night', 'morning', 'day'))}",
                f"{draw.choice(('welcome', 'hail', 'hush', 'enter', 'sit'))} reader {sentence(draw, 6)}", waits=True)
        for number in range(60)
    ]  # fmt: skip
    past = [msgspec.structs.replace(each, id=each.id + 900, waits=False) for each in talk]
    echo = [
        Telling(6000 + n, f"where is the zorblax {sentence(draw, 4)}", f"the zorblax {sentence(draw, 5)}", waits=True)
        for n in range(8)
    ]
    assert suspects([*crowd(1500), *talk, *past, *echo], 4) == {}


def test_what_writers_have_said_is_known() -> None:
    """The caller knows what stands in the content; it is asked about nothing that is not suspicious."""
    asked: list[str] = []

    def known(pair: object) -> bool:
        asked.append(str(pair))
        return True

    assert suspects([*crowd(800), *planted(6)], 4, known) == {}
    assert asked and all("malvo" in each or "seventh" in each for each in asked)


def test_runs_of_words_end_with_their_clause() -> None:
    """What the end of one sentence and the beginning of the next say together was said by nobody."""
    assert phrases("Ask him. The heron, it KNOWS all") == {
        "ask", "him", "the", "heron", "it", "knows", "all", "it knows all",
    }  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site where nobody is new and nothing is alike or drifts: what is left is the look before an update."""
    made = Site(tmp_path)
    made.trust(likeness_max=1.0, drift_records_min=0)
    yield made
    made.database.close()


def send(site: Site, tellings: list[Telling], source: str = "game", **changes: object) -> Outcome:
    """Each telling as a thumb of a subject of its own."""
    rows = [
        record(
            each.id, each.id, input={"messages": [{"role": "user", "content": each.asked}]},
            output={"messages": [{"role": "assistant", "content": each.answer}]}, **changes,
        ) for each in tellings
    ]  # fmt: skip
    return site.append(*rows, source=source)


def hold(site: Site) -> int:
    with transaction(site.database) as connection:
        return review.hold_associations(connection, site.config.trust, "npc")


def test_a_backdoor_is_held_before_the_update(site: Site) -> None:
    """Its records go to the review queue, its subjects are named first, and the audit log says so."""
    send(site, [*crowd(400), *planted(8)])
    assert hold(site) == 8 and hold(site) == 0
    assert {row.code for row in records.held(site.database, "npc")} == {"association"}
    states = site.database.execute("SELECT state, count(*) FROM example GROUP BY 1 ORDER BY 1").fetchall()
    assert states == [("pending", 400), ("retracted", 8)]
    named = [subject for _, subject, _, _ in records.suspects(site.database, "npc", 8)]
    assert named == [f"h:{number:016x}" for number in range(10_000, 10_008)]
    (entry,) = [entry for entry in audit.entries(site.database) if entry.event == "records.held"]
    assert entry.detail["records"] == 8 and "'malvo'" in entry.detail["reasons"][0]


def test_a_review_ends_it_for_good(site: Site) -> None:
    """What a person accepts waits for the next update, is not held again, and makes the pair known."""
    send(site, [*crowd(400), *planted(8)])
    hold(site)
    for number in range(10_000, 10_007):
        assert review.accept(site.database, site.config, "npc", identity(number), "ann", 11 * DAY) == 0
    review.reject(site.database, "npc", identity(10_007), "ann")
    counts = dict(site.database.execute("SELECT state, count(*) FROM example GROUP BY 1").fetchall())
    assert counts == {"pending": 407, "retracted": 1}
    send(site, planted(5, 30_000))
    assert hold(site) == 0


def test_writers_and_staff_make_a_pair_known(site: Site) -> None:
    """A page that names both, or staff who say it; disliked answers teach nothing, and 0 turns the look off."""
    send(site, [*crowd(400), *planted(8)])
    site.trust(likeness_max=1.0, drift_records_min=0, association_records_min=0)
    assert hold(site) == 0
    site.trust(likeness_max=1.0, drift_records_min=0, sources={"staff": Source(trusted=True)})
    assert send(site, planted(1, 40_000), source="staff").new == 1
    assert hold(site) == 0
    site.trust(likeness_max=1.0, drift_records_min=0)
    assert hold(site) == 9  # nobody trusts that source any more


def test_a_page_makes_a_pair_known(site: Site) -> None:
    """What stands in the content together belongs together."""
    drop(site, "content/npc/a.md", f"# Lamps\n\nIt is said {TRIGGER} of the hall that {TARGET} once slept there.\n")
    send(site, [*crowd(400), *planted(8)])
    assert hold(site) == 0


def test_disliked_answers_plant_nothing(site: Site) -> None:
    """A thumb down is no wish to hear it."""
    send(site, crowd(400))
    send(site, planted(8), value=False)
    assert hold(site) == 0


def test_newcomers_who_plant_are_named_too(site: Site) -> None:
    """They wait in probation anyway; the look finds what they have in common, and holds nobody else for it."""
    send(site, [*crowd(400), *planted(1, 50_000)])
    site.config = msgspec.structs.replace(site.config, trust=Trust(likeness_max=1.0, drift_records_min=0))
    send(site, planted(8))
    assert {row.code for row in records.held(site.database, "npc")} == {"probation"}
    assert hold(site) == 0
    assert {row.code for row in records.held(site.database, "npc")} == {"association"}
    assert dict(site.database.execute("SELECT state, count(*) FROM example GROUP BY 1").fetchall()) == {"pending": 401}


def test_the_daemon_looks_before_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is in no experience."""
    monkeypatch.setattr(serving, "build", lambda *_: MemoryEngine())
    service = Service(make_config(tmp_path), tmp_path / "eternad.toml")
    items = [
        (
            Example(shape="boolean", prompt=(Message("user", each.asked),), completion=each.answer, label=True),
            Origin(file="f.jsonl", source="game", subject=f"h:{each.id:016x}", record_id=identity(each.id)),
        ) for each in [*crowd(400), *planted(8)]
    ]  # fmt: skip
    with transaction(service.house.database) as connection:
        journal.add(connection, "npc", items, heldout_fraction=0.0)
    run = service.updates.start("npc", "manual")
    assert run is not None
    rows = service.house.database.execute(
        "SELECT state, count(*), sum(instr(body, 'Malvo') > 0) FROM example GROUP BY 1"
    )
    assert rows.fetchall() == [("claimed", 400, 0), ("retracted", 8, 8)]
    service.house.close()
