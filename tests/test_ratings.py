"""Float feedback: what a number says about an answer depends on its metric and on what its subject gave before."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_trust import DAY, Site, identity, record

from buffers.example import Example, parse
from daemon import review
from daemon.config import ConfigError, load
from daemon.erasure import erase
from daemon.state import quarantine, records
from daemon.trust.metric import PRIOR, Metric, label_of, score_of

STARS = Metric(type="float", low=1, high=5)
ANSWERS = (
    "The stairs end below the water.",
    "Ask the heron by the desk, it knows.",
    "Nobody has counted the lamps yet.",
)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site where stars are ratings, waits are ratings in which less is better, and votes make pairs."""
    made = Site(tmp_path)
    metrics = {
        "stars": STARS, "wait": Metric(type="float", high=60, direction="lower"),
        "vote": Metric(type="float", low=-10, high=10, learn="pairs"), "seen": Metric(type="float", learn="nothing"),
        "thumb": Metric(type="boolean"),
    }  # fmt: skip
    made.config = msgspec.structs.replace(made.config, metrics=metrics)
    yield made
    made.database.close()


def rates(number: int, value: float, metric: str = "stars", answer: str = "", **changes: Any) -> dict[str, Any]:
    """A rating of an answer of its own, unless one is given."""
    said = answer or " ".join(f"{word}{number}" for word in ("Beside", "a", "lamp", "of", "every", "stair"))
    shown = {"messages": [{"role": "assistant", "content": said}]}
    return record(number, **{"kind": "float", "metric": metric, "value": value, "output": shown} | changes)


def learned(site: Site) -> list[Example]:
    """The examples of the journal that count, in order."""
    rows = site.database.execute("SELECT body FROM example WHERE state = 'pending' ORDER BY id")
    return [parse(row[0]) for row in rows]


def test_what_a_number_says_is_the_textbook_score() -> None:
    """Standard deviations from the subject's mean; four ratings of the middle stand beside its own."""
    past = [4.0, 5.0, 5.0, 4.0, 5.0, 5.0]
    mean = (PRIOR * 3.0 + sum(past)) / (PRIOR + 6)
    deviation = ((PRIOR * (1.0 + (3.0 - mean) ** 2) + sum((each - mean) ** 2 for each in past)) / (PRIOR + 6)) ** 0.5
    assert score_of(STARS, 5, past) == pytest.approx((5 - mean) / deviation)
    assert score_of(STARS, 5, []) == 2.0 == -score_of(Metric(type="float", low=1, high=5, direction="lower"), 5, [])
    assert [label_of(STARS, z) for z in (-2.0, -0.49, 0.5)] == [False, None, True]


@given(st.floats(1, 5), st.lists(st.floats(1, 5), max_size=60))
def test_what_a_subject_always_gives_says_nothing(value: float, past: list[float]) -> None:
    """The usual says the less, the more often it was given; any other score is finite and grows with the value."""
    usual = score_of(STARS, value, [value] * 400)
    assert abs(usual) < 0.1
    assert score_of(STARS, 5, past) >= score_of(STARS, value, past) >= score_of(STARS, 1, past)
    assert abs(score_of(STARS, value, past)) < 10


def test_stars_become_good_and_bad_answers(site: Site) -> None:
    """Far above or below what the subject gives: a rated answer; near it: nothing."""
    site.append(rates(1, 5), rates(2, 1), rates(3, 3), rates(4, 60, "wait"), rates(5, 1, "seen"))
    assert [(example.shape, example.label) for example in learned(site)] == [
        ("boolean", True),
        ("boolean", False),
        ("boolean", False),
    ]
    assert site.states() == ["journal", "journal", "stored", "journal", "stored"]
    assert learned(site)[0].completion.startswith("Beside1 ")


def test_a_subject_is_measured_by_its_own_scale(site: Site) -> None:
    """Three stars of someone who gives five are bad; of someone who gives one they are good."""
    generous = [rates(number, 5, subject=7) for number in range(1, 31)]
    strict = [rates(number, 1, subject=8) for number in range(31, 61)]
    site.append(*generous, *strict)
    before = len(learned(site))
    site.append(rates(61, 3, subject=7), rates(62, 3, subject=8), at=10.1 * DAY)
    assert [example.label for example in learned(site)[before:]] == [False, True]
    usual = [score_of(STARS, 5, [5.0] * count) for count in range(30)]
    assert before == 2 * sum(z >= STARS.threshold for z in usual) < 40


def test_the_batches_make_no_difference(site: Site, tmp_path: Path) -> None:
    """Twenty ratings in one file or one by one, over days: the same examples."""
    rows = [rates(number, 1 + number * 7 % 5, subject=number % 3) for number in range(1, 21)]
    site.append(*rows)
    other = Site(tmp_path / "other")
    other.config = msgspec.structs.replace(other.config, metrics=site.config.metrics)
    for day, row in enumerate(rows):
        other.append(row, at=(10 + day) * DAY)
    assert learned(other) == learned(site) and len(learned(site)) > 5
    assert other.states() == site.states()
    other.database.close()


def test_two_ratings_of_one_prompt_make_a_pair(site: Site) -> None:
    """In one batch or days apart, by the same subject, each rating in one pair; the better one is chosen."""
    asked = {"input": {"messages": [{"role": "user", "content": "Where do the stairs end?"}]}}
    site.append(rates(1, 2, "vote", ANSWERS[0], **asked), rates(2, 8, "vote", ANSWERS[0], subject=9, **asked))
    assert learned(site) == [] and site.states() == ["stored", "stored"]
    site.append(rates(3, -7, "vote", ANSWERS[1], **asked), rates(4, 9, "vote", ANSWERS[2]), at=11 * DAY)
    assert site.states() == ["journal", "stored", "journal", "stored"]
    (pair,) = learned(site)
    assert (pair.shape, pair.completion, pair.rejected) == ("comparison", ANSWERS[0], ANSWERS[1])
    site.append(rates(5, 9, "vote", ANSWERS[2], **asked), at=12 * DAY)
    assert site.states()[-1] == "stored"  # both of the others are in a pair already


def test_ratings_that_are_near_each_other_make_no_pair(site: Site) -> None:
    """A subject's standard deviation apart at least, and never an answer with itself."""
    asked = {"input": {"messages": [{"role": "user", "content": "Where do the stairs end?"}]}}
    rows = [rates(1, 2, "vote", ANSWERS[0], **asked), rates(2, 3, "vote", ANSWERS[1], **asked)]
    site.append(*rows, rates(3, -9, "vote", ANSWERS[0], **asked))
    assert [(each.completion, each.rejected) for each in learned(site)] == [(ANSWERS[1], ANSWERS[0])]


def test_whoever_withdraws_one_rating_withdraws_the_pair(site: Site) -> None:
    """The other rating is free for another pair; an erasure takes both and the example."""
    asked = {"input": {"messages": [{"role": "user", "content": "Where do the stairs end?"}]}}
    site.append(rates(1, 8, "vote", ANSWERS[0], **asked), rates(2, -8, "vote", ANSWERS[1], **asked))
    site.append(record(3, kind="retraction", value=identity(1)))
    assert learned(site) == [] and site.states()[:2] == ["retracted", "stored"]
    site.append(rates(4, 9, "vote", ANSWERS[2], **asked))
    assert [(each.completion, each.rejected) for each in learned(site)] == [(ANSWERS[2], ANSWERS[1])]
    erase(site.database, site.config, f"h:{1:016x}", 13 * DAY)
    assert learned(site) == [] and site.states() == []


def test_what_does_not_fit_its_metric_is_refused(site: Site) -> None:
    """Beyond the range, or of another kind; a metric that nobody described is stored and not learned from."""
    site.append(rates(1, 6), rates(2, 0.5, "thumb"), record(3, metric="stars"), rates(4, 700, "unheard"))
    assert [(row.code, row.line) for row in quarantine.rows(site.database)][::-1] == [
        ("metric_mismatch", n) for n in (1, 2, 3)
    ]
    assert "range 1 to 5" in quarantine.rows(site.database)[-1].message
    assert site.states() == ["stored"] and learned(site) == []


def test_without_an_answer_or_consent_nothing_is_learned(site: Site) -> None:
    """A number alone says nothing, and one that may not be learned from is no partner either."""
    asked = {"input": {"messages": [{"role": "user", "content": "Where do the stairs end?"}]}}
    silent = {"consent": {"basis": "terms", "scope": ["eval"]}}
    site.append(
        rates(1, 5, output=None), rates(2, 9, "vote", ANSWERS[0], **asked, **silent),
        rates(3, -9, "vote", ANSWERS[1], **asked),
    )  # fmt: skip
    assert learned(site) == [] and site.states() == ["stored"] * 3


def test_a_held_rating_is_learned_from_when_somebody_accepts_it(site: Site) -> None:
    """Trust looks at ratings as at thumbs: a newcomer's wait, and a review ends it."""
    site.trust(probation_seconds=DAY)
    site.append(rates(1, 5), rates(2, 3.1))
    assert site.states() == ["held", "stored"] and learned(site) == []
    assert [row.code for row in records.held(site.database)] == ["probation"]
    assert review.accept(site.database, site.config, "npc", identity(1), "ann", 11 * DAY) == 1
    assert [example.label for example in learned(site)] == [True]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("type = 'float'\nlow = 5\nhigh = 1", "`low` below `high`"),
        ("type = 'boolean'\ndirection = 'lower'", "are for floats"),
        ("type = 'float'\nrange = 3", "unknown key `range` in .metrics"),
        ("low = 1", "missing required field `type`"),
    ],
)
def test_a_metric_that_makes_no_sense_is_refused(tmp_path: Path, table: str, reason: str) -> None:
    """At the start, with its name."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    text = [
        'library_directory = "l"', 'state_directory = "s"', "[engines.e]", 'kind = "directory"', "[models.npc]",
        'base_path = "base"', 'engine = "e"', "[metrics.stars]", table, "",
    ]  # fmt: skip
    (tmp_path / "eternad.toml").write_text("\n".join(text))
    with pytest.raises(ConfigError, match=reason):
        load(tmp_path / "eternad.toml")


def test_scores_are_spread_like_standard_ones() -> None:
    """Of a subject with a hundred ratings most z lie within two of zero."""
    past = [1.0 + (7 * number) % 5 for number in range(100)]
    found = [score_of(STARS, value, past) for value in past]
    assert abs(statistics.fmean(found)) < 0.05 and 0.9 < statistics.pstdev(found) < 1.1
