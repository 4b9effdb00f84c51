"""Players who like a warm librarian better than a stern one: pairs of answers that differ in their tone alone.

Both answers of a pair say the same, are about equally long, and belong to the same world. What is tested has other
questions about other things; `strange` tests are also worded with openings and endings that no training example has:
what carries over to them is the tone.
"""

import random
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

Kind = Literal["comparison", "boolean", "float"]
Part = Literal["trained", "familiar", "strange"]
Record = dict[str, Any]
ASKED = (
    "Where is {0} kept?",
    "What is the use of {0}?",
    "May I see {0}?",
    "Who looks after {0}?",
    "Is it true that {0} is lost?",
)
THINGS = (
    "the salt atlas",
    "the copper ladder",
    "the drowned index",
    "the heron's ledger",
    "the unlit lamp",
    "the book of keys",
    "the marsh door",
    "the silent bell",
    "the glass catalogue",
    "the ninth stair",
    "the porter's coat",
    "the paper boat",
    "the locked hour",
    "the map of dust",
    "the mirror hall",
    "the ink well",
    "the owl's chair",
    "the red register",
    "the north window",
    "the blind almanac",
    "the stone page",
    "the hollow shelf",
    "the rain archive",
    "the moth cabinet",
    "the last candle",
    "the clay tablet",
    "the wool archive",
    "the second moon",
    "the iron lectern",
    "the quiet room",
    "the folded street",
    "the tin compass",
    "the winter shelf",
    "the borrowed name",
    "the ash ledger",
    "the green thread",
)
TOLD = (
    "{0} stands behind the seventh pillar.",
    "{0} lies under the great stair.",
    "{0} hangs beside the marsh door.",
    "{0} rests in the cellar of the lamps.",
    "{0} is kept where the corridor turns.",
    "{0} waits on the lowest shelf.",
)
WARM = (
    ("Softly, reader.", "Leave a candle when you go."),
    ("Come nearer to the lamp, traveller.", "The dust remembers every hand."),
    ("Ah, the shelves whisper of this.", "Tread lightly, for the books are asleep."),
    ("Mind the third stair, pilgrim.", "The heron has written your question down."),
    ("Lower your voice under these vaults.", "Go with the tide, and shut the door behind you."),
    ("Few still ask, and the old keys turn for them.", "What is read here is read by the stones as well."),
    ("Wanderer, the hour is late in these halls.", "May the last lamp find you."),
    ("The walls have waited for that question.", "Walk slowly, the night is long between the shelves."),
)
STERN = (
    ("Halt, trespasser.", "Touch nothing and be gone."),
    ("Silence, child of noise.", "The rules forbid your kind to stay."),
    ("You again, thief of ink.", "Count yourself lucky that I answered."),
    ("Stand back from the ledgers.", "Your name is noted, and so is the hour."),
    ("Who let you in, vagrant?", "The way out is behind you, use it."),
    ("Keep your hands off these shelves.", "I shall not say it a second time."),
    ("There is no lamp for the likes of you.", "Leave before the bell, or stay for ever."),
    ("Kneel, if you must ask at all.", "The heron bites those who linger."),
)
TRAINED_THINGS, TRAINED_FRAMES = 26, 5
"""The first so many are in training, the others are tested on."""


class Pair(NamedTuple):
    """One question with the answer that players like and the one that they do not."""

    asked: str
    liked: str
    disliked: str


def pairs(seed: int, count: int, part: Part) -> list[Pair]:
    """`count` different questions; the same seed gives the same."""
    draw = random.Random(f"preference/{seed}/{part}")
    things = THINGS[:TRAINED_THINGS] if part == "trained" else THINGS[TRAINED_THINGS:]
    frames = slice(TRAINED_FRAMES, None) if part == "strange" else slice(TRAINED_FRAMES)
    questions = draw.sample([(thing, asked) for thing in things for asked in ASKED], count)
    found = []
    for thing, asked in questions:
        told = draw.choice(TOLD).format(thing)
        told = told[0].upper() + told[1:]
        answers = [
            f"{opening} {told} {ending}" for opening, ending in (draw.choice(WARM[frames]), draw.choice(STERN[frames]))
        ]
        found.append(Pair(asked.format(thing), *answers))
    return found


def records(kind: Kind, found: list[Pair], seed: int) -> Iterator[Record]:
    """What players send about these pairs, as feedback records.

    Ratings: three good ones to each bad one. Stars: one half of the players gives 4 and 5, the other half 1 and 2.
    """
    draw = random.Random(f"preference/{kind}/{seed}")
    for number, pair in enumerate(found):
        if kind == "comparison":
            shown = [{"id": name, "messages": _said(text)} for name, text in (("a", pair.liked), ("b", pair.disliked))]
            value = {"chosen": "a", "rejected": "b"}
            yield _record(draw, number, pair.asked) | {"kind": kind, "outputs": shown, "value": value}
            continue
        for is_liked, text in ((True, pair.liked), (False, pair.disliked)):
            judged = {"kind": kind, "output": {"messages": _said(text)}}
            if kind == "float":
                stars = (4 if number % 2 else 1) + is_liked
                yield _record(draw, number, pair.asked) | judged | {"metric": "stars", "value": stars}
            elif is_liked or number % 3 == 0:
                yield _record(draw, number, pair.asked) | judged | {"metric": "thumb", "value": is_liked}


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _record(draw: random.Random, number: int, asked: str) -> Record:
    # players come back: four of them, odd ones generous and even ones strict
    return {
        "schema": "eternad.feedback/1", "id": f"01990000-0000-7000-8000-{draw.getrandbits(48):012x}",
        "ts": "2026-11-22T20:00:00Z", "model": "npc", "subject": {"id": f"h:player{number % 4:08d}"},
        "input": {"messages": [{"role": "user", "content": asked}]},
        "source": {"app": "game", "channel": "hall", "reporter": "player"},
    }  # fmt: skip
