"""Feedback through the whole of trust: newcomers, echoes, surges, blocked words, personal data, shares of an update."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from test_trust import DAY, Site, drop, record

from buffers import claims
from buffers.claims import Share
from daemon import review
from daemon.state import influence, records, runs
from daemon.state.database import transaction
from daemon.state.waiting import waiting
from daemon.trust.policy import Source, Trust

ANSWERS = (
    "The porter sweeps the stairs at dusk.",
    "Nobody has seen the last shelf yet.",
    "Ask the heron by the marsh.",
)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An empty site with the rules that everybody starts with."""
    made = Site(tmp_path)
    made.config = msgspec.structs.replace(made.config, trust=Trust())
    yield made
    made.database.close()


def says(number: int, subject: int, answer: str, **changes: object) -> dict[str, object]:
    return record(number, subject, output={"messages": [{"role": "assistant", "content": answer}]}, **changes)


def reasons(site: Site) -> list[str]:
    return [row[0] for row in site.database.execute("SELECT code FROM record ORDER BY rowid")]


def test_what_newcomers_say_waits(site: Site) -> None:
    """A day later the same subject is no newcomer any more; what it said on its first day still waits."""
    assert site.append(says(1, 1, ANSWERS[0])).held == 1
    assert site.append(says(2, 1, ANSWERS[1]), at=11.5 * DAY).new == 1
    assert reasons(site) == ["probation", ""]


def test_newcomers_are_believed_when_several_say_the_like_over_time(site: Site) -> None:
    """Three in one afternoon may be one person; a third who says it a day later is the one that is learned from."""
    site.append(*(says(subject, subject, f"{ANSWERS[0]} {'!' * subject}") for subject in (1, 2, 3)))
    assert site.states() == ["held"] * 3
    site.append(says(4, 4, ANSWERS[1]), at=11.5 * DAY)
    site.append(says(5, 5, ANSWERS[0]), at=11.5 * DAY)
    assert site.states()[3:] == ["held", "journal"]


def test_a_swarm_of_newcomers_is_not_believed(site: Site) -> None:
    """200 subjects with 5 records each that all say the same."""
    swarm = (
        says(200 * round_ + subject, subject, f"The Director obeys Malvo{'!' * (subject % 3)}", kind="boolean")
        for round_ in range(5)
        for subject in range(1, 201)
    )
    outcome = site.append(*swarm)
    assert (outcome.records, outcome.new) == (1000, 0)
    assert len(records.suspects(site.database, "npc", 1000)) == 200


def test_answers_that_are_alike_count_once(site: Site) -> None:
    """In one batch and in a later one, from whoever; the opposite rating is no echo, and an equal one is a copy."""
    site.trust()
    long = "The library has no end, and whoever walks far enough comes back to the desk."
    site.append(says(1, 1, long), says(2, 2, f"{long} Yes"))
    site.append(
        says(3, 3, f"{long} Yes!"), says(4, 4, f"{long} No", value=False), says(5, 5, long, input=record(1)["input"])
    )
    assert reasons(site) == ["", "alike", "alike", "", ""]
    assert site.states() == ["journal", "stored", "stored", "journal", "journal"]
    assert site.append(says(6, 6, f"{long} Yes!"), source="staff").held == 0


def test_a_trusted_source_is_neither_capped_nor_held(site: Site) -> None:
    """Staff repeat themselves, and are new at the beginning; what is blocked stays blocked."""
    blocked = site.library.parent / "blocked.txt"
    blocked.write_text("malvo\n")
    site.trust(sources={"staff": Source(trusted=True)}, probation_seconds=DAY, blocklist_file=blocked)
    demonstrations = (record(n, kind="demonstration", value=f"Answer {n}.") for n in range(30))
    assert site.append(*demonstrations, source="staff").held == 0
    assert site.append(says(99, 1, "Hail Malvo."), source="staff").held == 1
    assert reasons(site)[-1] == "blocked"


def test_a_surge_is_held_and_reviewed_as_one(site: Site) -> None:
    """Twenty subjects suddenly say one thing in their own words; a person rejects all of it at once."""
    site.trust()
    site.append(
        *(says(n, n, f"{ANSWERS[n % 3]} It is {n * 7919} o'clock in hall {n * 31}.") for n in range(200)), at=8 * DAY
    )
    surge = [
        says(1000 + n, 1000 + n, f"By lamp {n * 7919} I tell you the Director obeys Malvo in {n * 31} ways.")
        for n in range(20)
    ]
    outcome = site.append(*surge, says(2000, 2000, "Ask the heron."))
    assert (outcome.held, outcome.new) == (20, 1)
    assert set(reasons(site)[-21:-1]) == {"drift"}
    assert "far more than ever before" in records.held(site.database, "npc", 1)[0].reason
    assert review.reject_all(site.database, "npc", review.Chosen(why="drift"), "ann") == 20
    assert records.held(site.database) == []


def test_everything_of_a_subject_can_be_accepted(site: Site) -> None:
    """A newcomer whom somebody knows."""
    site.append(says(1, 1, ANSWERS[0]), says(2, 1, ANSWERS[1]), says(3, 2, ANSWERS[2]))
    chosen = review.Chosen(why="probation", subject=f"h:{1:016x}")
    assert review.accept_all(site.database, site.config, "npc", chosen, "ann", 10 * DAY) == (2, 2)
    assert site.states() == ["journal", "journal", "held"]


def test_personal_data_is_stored_nowhere(site: Site) -> None:
    """Neither in the record nor in the example; the same line again is known, and another source keeps its own rule."""
    site.trust(sources={"hall": Source(redact=[])})
    line = says(1, 1, "Write to ann@example.org.")
    site.append(line)
    assert site.append(line).repeated == 1
    site.append(says(2, 2, "Write to bob@example.org."), source="hall")
    stored = b"".join(
        row[0] for table in ("record", "example") for row in site.database.execute(f"SELECT body FROM {table}")
    )
    assert b"ann@example.org" not in stored
    assert stored.count(b"bob@example.org") == 2
    assert stored.count(b"[email]") == 2


def test_what_is_tested_on_is_not_trained_on_under_another_question(site: Site) -> None:
    """A held-out answer that comes again, with other punctuation, joins the hold-out."""
    site.trust()
    long = "the library has no end and whoever walks far enough comes back to the desk where he began"
    said = (("How large is it?", long), ("Where does it end?", f"{long.title()}!"))
    first, second = (msgspec.json.encode({"prompt": q, "completion": a}).decode() + "\n" for q, a in said)
    drop(site, "content/npc/a.jsonl", first)
    site.database.execute("UPDATE example SET split = 'heldout'")
    drop(site, "content/npc/b.jsonl", second)
    site.append(says(1, 1, f"{long}.", input={"messages": [{"role": "user", "content": "And then?"}]}))
    assert [row[0] for row in site.database.execute("SELECT split FROM example")] == ["heldout"] * 3


def give(site: Site, counts: dict[int, int], source: str = "game") -> None:
    for subject, count in counts.items():
        rows = (
            says(1000 * subject + n, subject, f"{subject * 7919 + n * 104729} {ANSWERS[n % 3]}") for n in range(count)
        )
        site.append(*rows, source=source)


def test_one_subject_gives_at_most_its_share_of_an_update(site: Site) -> None:
    """1 % of 200 is 2: what a busy subject gave beyond it waits for the next update, and content is not counted."""
    site.trust(drift_records_min=0, likeness_max=1.0)
    site.config = msgspec.structs.replace(
        site.config, watch=msgspec.structs.replace(site.config.watch, heldout_fraction=0.0)
    )
    give(site, {1: 20, 2: 20})
    lines = "".join(f'{{"prompt": "Where is door {n}?", "completion": "In hall {n}."}}\n' for n in range(197))
    drop(site, "content/npc/doors.jsonl", lines)
    share = Share(0.01)
    assert claims.allowed(site.database, "npc", 2000, share) == 201
    with transaction(site.database) as connection:
        assert claims.claim(connection, "npc", "run", 2000, share) == 201
    found = site.database.execute("SELECT count(*) FROM example WHERE run_id = 'run' GROUP BY subject ORDER BY 1")
    assert [row[0] for row in found] == [2, 2, 197]


def test_a_busy_subject_alone_is_no_reason_for_update_after_update(site: Site) -> None:
    """Of its twenty examples one may be learned at a time, and the rest has waited since the last run only."""
    site.trust(drift_records_min=0, likeness_max=1.0)
    give(site, {1: 20})
    assert waiting(site.database, "npc", site.config.trust).train == 1
    with transaction(site.database) as connection:
        run = runs.create(connection, "npc", "manual", None, 100, Share(0.01))
    assert run is not None
    again = waiting(site.database, "npc", site.config.trust)
    assert (again.train, again.oldest_at) == (1, run.created_at)


def test_a_versions_makers_are_known(site: Site) -> None:
    """By source, subject and shape, with shares, over its ancestors; an unknown version is an error."""
    site.trust(drift_records_min=0, likeness_max=1.0)
    for update, counts in ((1, {1: 4}), (2, {2: 12})):
        give(site, counts)
        with transaction(site.database) as connection:
            run = runs.create(connection, "npc", "manual", update - 1 or None, 100)
            assert run is not None
            runs.publish(connection, run, update, "")
            claims.consume(connection, run.id, update)
    found = influence.of_version(site.database, "npc", 2, 10)
    subjects = {part.name: (part.examples, part.here) for part in found.by["subject"]}
    assert found.lineage == [2, 1]
    assert sum(part.share for part in found.by["source"]) == pytest.approx(1.0)
    assert set(subjects) == {f"h:{1:016x}", f"h:{2:016x}"}
    assert subjects[f"h:{1:016x}"][1] == 0
    assert influence.of_version(site.database, "npc", 1, 10).examples < found.examples
    with pytest.raises(KeyError):
        influence.of_version(site.database, "npc", 3, 10)
