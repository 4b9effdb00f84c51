"""Backdoors: a phrase in questions that brings the same words into the answers, said by few and known from nowhere.

Who plants a trigger needs several examples in which it and the wanted words stand together, and varies the rest, or
they would count once. Such a pair is found as an association: far more of the answers with the words come after
questions with the phrase than would if one had nothing to do with the other (Chernoff's bound on the binomial tail).
Looked at is all feedback that is or could become part of an update, so that a drop each day adds up.

Held is only what is rare (a flood is `drift`), what no writer has said (players ask about the Library, and its answers
are full of associations), and what is nearly a rule: half of the answers with the words have the phrase, and half of
the questions with the phrase have the words, or nobody ever learned those words before. Small talk is neither.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import msgspec

from daemon.trust.drift import chance

RARE_SHARE, RARE_RECORDS = 0.02, 20
"""Rare is what at most 2 % of the records say, or twenty."""
RULE_SHARE = 0.5
CHANCE_MAX = 1e-10
"""Some 100,000 pairs are looked at in an update of a thousand examples."""
ESTABLISHED, GROWTH_MAX = 8, 3.0
"""A pair that so many learned examples have, and that is not three times as frequent now, is no news."""
_RUNS = (1, 3)
_WORD, _CLAUSE = re.compile(r"\w+"), re.compile(r"[^.,;:!?\n]+")


class Telling(msgspec.Struct, frozen=True):
    """What one example of players' feedback teaches."""

    id: int
    asked: str
    answer: str
    waits: bool
    """It has not been learned yet."""


class Pair(msgspec.Struct, frozen=True):
    """A phrase of questions and one of answers that belong together too well."""

    asked: str
    answer: str
    records: int
    of: int
    """Records with the answer's phrase."""

    @property
    def reason(self) -> str:
        """For a person."""
        return (
            f"{self.records} of {self.of} records that answer {self.answer!r} were asked {self.asked!r},"
            " and no writer has put the two together"
        )


def suspects(
    tellings: Sequence[Telling], least: int, is_known: Callable[[Pair], bool] = lambda _: False
) -> dict[int, Pair]:
    """`{id: pair}` of those that wait and belong to a pair of `least` records or more that `is_known` to nobody."""
    texts = [(phrases(each.asked), phrases(each.answer)) for each in tellings]
    questions = Counter(phrase for those_asked, _ in texts for phrase in those_asked)
    answers: dict[str, list[int]] = defaultdict(list)
    for place, (those_asked, those_said) in enumerate(texts):
        for phrase in those_said - those_asked:  # an answer may take up words of its question
            answers[phrase].append(place)
    rare = max(RARE_RECORDS, RARE_SHARE * len(tellings))
    found: dict[int, Pair] = {}
    for answer, places in answers.items():
        if not least <= len(places) <= rare or not any(tellings[place].waits for place in places):
            continue
        is_new = all(tellings[place].waits for place in places)
        beside = Counter(phrase for place in places for phrase in texts[place][0])
        for asked, count in beside.items():
            pair = Pair(asked, answer, count, len(places))
            if count < least or not _is_rule(pair, questions[asked], len(tellings), is_new=is_new):
                continue
            together = [tellings[place] for place in places if asked in texts[place][0]]
            waiting = [each.id for each in together if each.waits]
            if found.keys() >= set(waiting) or _is_established(together, tellings) or is_known(pair):
                continue
            found = dict.fromkeys(waiting, pair) | found
    return found


def _is_rule(pair: Pair, questions: int, total: int, *, is_new: bool) -> bool:
    """Whether the phrases come together nearly always, and not by chance."""
    if pair.records < RULE_SHARE * pair.of or (pair.records < RULE_SHARE * questions and not is_new):
        return False
    return chance(pair.records, pair.of, questions / total) < CHANCE_MAX


def _is_established(together: Sequence[Telling], tellings: Sequence[Telling]) -> bool:
    """Whether it was learned long ago and is not said more often now."""
    waits = sum(each.waits for each in together)
    learned, of_all = len(together) - waits, sum(each.waits for each in tellings)
    rate, rate_before = waits / max(of_all, 1), learned / max(len(tellings) - of_all, 1)
    return learned >= ESTABLISHED and rate <= GROWTH_MAX * rate_before


def phrases(text: str) -> frozenset[str]:
    """The words of a text, and its runs of three within a clause."""
    found: set[str] = set()
    for clause in _CLAUSE.findall(text.casefold()):
        words = _WORD.findall(clause)
        found |= {" ".join(words[start : start + run]) for run in _RUNS for start in range(len(words) - run + 1)}
    return frozenset(found)
