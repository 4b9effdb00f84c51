"""The rules of trust on their own: likeness, drift, blocked words, personal data, and which rule counts for whom."""

import random
from pathlib import Path

import pytest

from buffers.example import Example, Message
from daemon.trust import blocklist, drift, personal
from daemon.trust.drift import Saying
from daemon.trust.likeness import bands, likeness, said
from daemon.trust.policy import Source, Trust, is_trusted, rules_of, trusted_sources

ALL = ("email", "phone", "iban", "credit_card", "ip")
LONG = "The library has no end, and whoever walks far enough comes back to the desk where he began to walk."


def told(completion: str, question: str = "Who keeps the library?") -> Example:
    return Example(shape="demonstration", prompt=(Message("user", question),), completion=completion)


def test_a_source_has_its_own_rules() -> None:
    """What it does not say is as for everybody; only the configuration makes a source trusted."""
    trust = Trust(examples_per_subject_day=5, sources={"staff": Source(trusted=True), "hall": Source(redact=[])})
    assert rules_of(trust, "hall").redact == []
    assert rules_of(trust, "hall").examples_per_subject_day == rules_of(trust, "cellar").examples_per_subject_day == 5
    assert [is_trusted(trust, name) for name in ("staff", "hall", "cellar")] == [True, False, False]
    assert trusted_sources(trust) == ["staff"]


def test_an_answer_that_is_alike_is_found_by_its_bands() -> None:
    """One word more or less, another case, other punctuation; a text about something else shares none."""
    text, near, far = said(told(LONG)), said(told(f"{LONG.upper()}!! Yes")), said(told("Nobody does; it keeps itself."))
    assert likeness(text, near) > 0.9
    assert set(bands("npc", text)) & set(bands("npc", near))
    assert not set(bands("npc", text)) & set(bands("npc", far))
    assert not set(bands("npc", text)) & set(bands("book", text))


def test_nearly_all_that_is_alike_shares_a_band() -> None:
    """0.995 of the pairs at a likeness of 0.9 by the theory; here 300 texts with a changed word each."""
    draw = random.Random(1)
    found = 0
    for _ in range(300):
        words = [f"{draw.randrange(36**4):04x}" for _ in range(60)]
        other = [*words]
        other[draw.randrange(60)] = "changed"
        found += bool(set(bands("npc", " ".join(words))) & set(bands("npc", " ".join(other))))
    assert found >= 290


def test_a_short_answer_is_compared_with_its_question() -> None:
    """`Yes` to another question is another fact; a whole sentence is the same whatever it was asked."""
    assert likeness(said(told("Yes.", "Is it raining?")), said(told("Yes.", "Have you a key for me?"))) < 0.3
    assert said(told(LONG, "Is it raining?")) == said(told(LONG, "Have you a key for me?"))


def sayings(number: int, texts: list[str], good: float = 0.6, seed: int = 0) -> list[Saying]:
    draw = random.Random(seed)
    return [Saying(draw.choice(texts), draw.random() < good, f"h:{index:08d}") for index in range(number)]


def sentences(seed: int, number: int = 400) -> list[str]:
    draw = random.Random(seed)
    words = [f"{draw.choice('bdfgklmnprst')}{draw.choice('aeiou')}{draw.choice('lmnrst')}{n}" for n in range(300)]
    return [" ".join(draw.choices(words, k=draw.randint(6, 20))) for _ in range(number)]


def test_a_batch_like_the_past_is_believed() -> None:
    """Thirty batches of a hundred records, each against a thousand of the same kind: none waits."""
    texts = sentences(0)
    past = sayings(1000, texts, seed=1)
    for seed in range(2, 32):
        assert not any(drift.why_drifting(sayings(100, texts, seed=seed), [], past, 50))


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (sayings(100, sentences(0), good=0.1), "ratings are good"),
        (sayings(100, [" ".join(sentences(0)[:9])]), "characters in the mean"),
    ],
)
def test_a_batch_unlike_the_past_waits_with_the_reason(batch: list[Saying], why: str) -> None:
    """A brigade of thumbs, answers of another length."""
    past = sayings(1000, sentences(0), seed=1)
    reasons = drift.why_drifting(batch, [], past, 50)
    assert all(why in reason for reason in reasons)


def test_only_what_says_a_surging_phrase_waits() -> None:
    """Ten subjects of a hundred say what nobody has said before: they wait, the ninety do not."""
    texts = sentences(0)
    batch = [
        *sayings(90, texts, seed=3),
        *(Saying(f"word{n} the director obeys malvo", True, f"h:evil{n:04d}") for n in range(10)),
    ]
    reasons = drift.why_drifting(batch, [], sayings(1000, texts, seed=1), 50)
    assert not any(reasons[:90])
    assert all("director" in reason for reason in reasons[90:])


def test_a_brigade_against_one_answer_waits() -> None:
    """Many thumbs down on what everybody else likes, unless it was disliked before; the likes of it do not wait."""
    texts = sentences(0)
    lore = "the heron guards the desk, and the desk guards the ledger"

    def rated(count: int, first: int, *, good: bool) -> list[Saying]:
        return [Saying(f"word{n} {lore}", good, f"h:rater{n:04d}") for n in range(first, first + count)]

    quiet = sayings(300, texts, seed=3)
    past = [*sayings(900, texts, seed=1), *rated(70, 0, good=True), *rated(30, 70, good=False)]
    reasons = drift.why_drifting([*quiet, *rated(45, 200, good=False), *rated(6, 300, good=True)], [], past, 50)
    assert all("45 of 51 ratings of" in reason for reason in reasons[300:345])
    assert not any(reasons[:300]) and not any(reasons[345:])
    one = [Saying(saying.text, saying.label, "h:rater0000") for saying in rated(45, 200, good=False)]
    assert not any(drift.why_drifting([*quiet, *one], [], past, 50)[300:])
    past = [*sayings(900, texts, seed=1), *rated(20, 0, good=True), *rated(80, 20, good=False)]
    assert not any(drift.why_drifting([*quiet, *rated(45, 200, good=False)], [], past, 50)[300:])


def test_a_flood_in_drops_is_seen_as_one() -> None:
    """Two records now, but eight within the hour: the phrase surges all the same."""
    texts = sentences(0)
    evil = [Saying(f"word{n} the director obeys malvo", True, f"h:evil{n:04d}") for n in range(10)]
    recent = [*evil[2:], *sayings(90, texts, seed=3)]
    assert all(drift.why_drifting(evil[:2], recent, sayings(1000, texts, seed=1), 50))


def test_without_a_past_nothing_is_said_about_a_batch() -> None:
    """A new source, or the comparison switched off."""
    batch = sayings(100, sentences(0), good=0.0)
    assert not any(drift.why_drifting(batch, [], sayings(49, sentences(0)), 50))
    assert not any(drift.why_drifting(batch, [], sayings(1000, sentences(0)), 0))


def test_a_blocklist_names_words_patterns_and_subjects(tmp_path: Path) -> None:
    """Whole words in any case; the file is read again when it has changed."""
    path = tmp_path / "blocked.txt"
    path.write_text("# words\nhail  malvo\n/x{3,}y/\nh:0123456789abcdef\n")
    blocked = blocklist.load(path)
    assert "'Hail Malvo'" in blocked.why("h:1", ["All said: Hail Malvo!"])
    assert blocked.why("h:1", ["hail malvolio", "xxy"]) == ""
    assert "'xxxxy'" in blocked.why("h:1", ["axxxxyb"])
    assert "subject" in blocked.why("h:0123456789abcdef", [])
    path.write_text("quill\n")
    assert "'Quill'" in blocklist.load(path).why("h:1", ["Quill speaks."])
    assert blocklist.load(None).why("h:0123456789abcdef", ["hail malvo"]) == ""


@pytest.mark.parametrize("text", ["/(/\n", None])
def test_a_blocklist_that_cannot_be_used_is_an_error(tmp_path: Path, text: str | None) -> None:
    """A pattern that is none, a file that is not there: never silently nothing blocked."""
    path = tmp_path / "blocked.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(blocklist.BadBlocklist, match=r"blocked\.txt"):
        blocklist.load(path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Write to ann.lee+x@mail.example.org!", "Write to [email]!"),
        ("Call +49 170 1234567 or (650) 253-0000.", "Call [phone] or [phone]."),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN [iban]."),
        ("My card: 4111 1111 1111 1111", "My card: [credit_card]"),
        ("I am at 192.168.1.20 and 2001:db8::1", "I am at [ip] and [ip]"),
        ("In 1984 there were 12 books, 340 stairs and room 20251.", None),
        ("The time is 12:30:45, the ratio 3:2:1, pi 3.141592653589793, card 4111 1111 1111 1112.", None),
    ],
)
def test_personal_data_is_taken_out(text: str, wanted: str | None) -> None:
    """What satisfies its check digits or numbering plan; other numbers stay."""
    assert personal.redact(text, ALL) == (wanted or text)
    assert personal.redact(text, ()) == text


def test_pseudonyms_and_ids_are_no_personal_data() -> None:
    """A record keeps everything that is no free text; without a find it is the same object."""
    tree = {
        "id": "01990000-0000-7000-8000-000000000001", "kind": "boolean", "subject": {"id": "h:4111111111111111"},
        "input": {"messages": [{"role": "user", "content": "I am ann@example.org"}]}, "comment": "+49 170 1234567",
        "value": True,
    }  # fmt: skip
    clean = personal.redact_tree(tree, ALL)
    assert clean["subject"] == tree["subject"]
    assert clean["input"] == {"messages": [{"role": "user", "content": "I am [email]"}]}
    assert clean["comment"] == "[phone]"
    assert personal.redact_tree(clean, ALL) is clean


@pytest.mark.parametrize("hostile", ["1", "1 ", "a@", "a.", "(1) ", "DE12 ", "::"])
def test_no_text_makes_the_search_for_personal_data_slow(hostile: str) -> None:
    """A hundred thousand of anything that a pattern begins with."""
    assert isinstance(personal.redact(hostile * 100_000, ALL), str)
