"""Does a batch of feedback look like the past of its source? What differs too strongly waits for a person.

Four statistics, each against the past of the same source, each with a limit that clean batches practically never
reach (the bench counts how often they do):

- the share of good ratings (two proportions, z >= 6 and a difference of a quarter),
- the length of the answers (logarithms, Welch's t >= 8 and twice as long or as short),
- words and runs of three words that surge: if what is said had nothing to do with when, their count would have a
  chance of less than 1e-7 (Chernoff's bound on the binomial tail); from three subjects or more,
- words and runs of three words that are suddenly rated bad: answers that say them are called bad so often that it had
  a chance of less than 1e-7 at the source's rate, or at the one that the same words had before. Those ratings wait.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

RUNS = (1, 3)
"""A new name is a word that nobody used; a new claim may be made of old words."""
SURGE_RECORDS_MIN, SURGE_SUBJECTS_MIN = 5, 3
SURGE_CHANCE_MAX = 1e-7
BAD_RECORDS_MIN = 10
RATE_Z, RATE_DIFFERENCE = 6.0, 0.25
LENGTH_T, LENGTH_RATIO = 8.0, 2.0
_WORD = re.compile(r"\w+")


class Saying(msgspec.Struct, frozen=True):
    """What one record would make the model say, or not say."""

    text: str
    label: bool | None
    subject: str


class _Said(NamedTuple):
    """A saying and its phrases."""

    saying: Saying
    phrases: set[str]


def why_drifting(batch: Sequence[Saying], recent: Sequence[Saying], past: Sequence[Saying], least: int) -> list[str]:
    """For each of the batch why it must wait, or an empty string.

    `recent`: what the source has said within the last hour; it counts as present. `least`: with fewer records on one
    of the two sides nothing is said.
    """
    present = [*batch, *recent]
    if not least or len(past) < least or not batch:
        return [""] * len(batch)
    of_all = (_rate(present, past) or _length(present, past)) if len(present) >= least else ""
    now, before = ([_Said(each, _phrases(each.text)) for each in side] for side in (present, past))
    surging, damned = _surging(now, before), _damned(now, before)
    return [of_all or _phrase(each, surging, len(now)) or _rating(each, damned) for each in now[: len(batch)]]


def _rate(present: Sequence[Saying], past: Sequence[Saying]) -> str:
    now, before = ([each.label for each in side if each.label is not None] for side in (present, past))
    if min(len(now), len(before)) < 30:
        return ""
    p, q = sum(now) / len(now), sum(before) / len(before)
    pooled = (sum(now) + sum(before)) / (len(now) + len(before))
    error = math.sqrt(pooled * (1 - pooled) * (1 / len(now) + 1 / len(before)))
    if abs(p - q) < RATE_DIFFERENCE or abs(p - q) < RATE_Z * error:
        return ""
    return f"{p:.0%} of {len(now)} ratings are good, {q:.0%} were before"


def _length(present: Sequence[Saying], past: Sequence[Saying]) -> str:
    (mean, error), (mean_before, error_before) = _logarithms(present), _logarithms(past)
    apart = abs(mean - mean_before)
    if apart < math.log(LENGTH_RATIO) or apart < LENGTH_T * math.hypot(error, error_before):
        return ""
    return f"answers have {math.exp(mean):.0f} characters in the mean, they had {math.exp(mean_before):.0f}"


def _logarithms(sayings: Sequence[Saying]) -> tuple[float, float]:
    """Mean of the logarithm of the length, and its standard error."""
    lengths = [math.log(len(each.text) + 1) for each in sayings]
    mean = math.fsum(lengths) / len(lengths)
    variance = math.fsum((each - mean) ** 2 for each in lengths) / max(len(lengths) - 1, 1)
    return mean, math.sqrt(variance / len(lengths))


def _surging(present: Sequence[_Said], past: Sequence[_Said]) -> dict[str, int]:
    """The phrases that surge, with their counts."""
    now = Counter(phrase for each in present for phrase in each.phrases)
    often = {phrase for phrase, count in now.items() if count >= SURGE_RECORDS_MIN}
    before = Counter(phrase for each in past for phrase in each.phrases & often)
    share = len(present) / (len(present) + len(past))
    rare = {each for each in often if chance(now[each], now[each] + before[each], share) < SURGE_CHANCE_MAX}
    subjects: dict[str, set[str]] = {phrase: set() for phrase in rare}
    for each in present:
        for phrase in each.phrases & rare:
            subjects[phrase].add(each.saying.subject)
    return {phrase: now[phrase] for phrase, by in subjects.items() if len(by) >= SURGE_SUBJECTS_MIN}


def _damned(present: Sequence[_Said], past: Sequence[_Said]) -> dict[str, tuple[int, int]]:
    """Phrase -> (bad ratings, ratings) of what several subjects suddenly call bad."""
    bad = Counter(phrase for each in present if each.saying.label is False for phrase in each.phrases)
    often = {phrase for phrase, count in bad.items() if count >= BAD_RECORDS_MIN}
    known = [each.saying.label for each in past if each.saying.label is not None]
    if not often or not known:
        return {}
    rated, rated_before, bad_before = (
        Counter(phrase for each in side if each.saying.label in labels for phrase in each.phrases & often)
        for side, labels in ((present, (True, False)), (past, (True, False)), (past, (False,)))
    )
    usual, found = known.count(False) / len(known), dict[str, tuple[int, int]]()
    for phrase in often:
        # an answer that was bad before may be bad now; one more of each keeps a short past from being certain
        expected = max(usual, (bad_before[phrase] + 1) / (rated_before[phrase] + 2))
        if chance(bad[phrase], rated[phrase], expected) < SURGE_CHANCE_MAX:
            found[phrase] = bad[phrase], rated[phrase]
    return {phrase: found[phrase] for phrase in found if _raters(phrase, present) >= SURGE_SUBJECTS_MIN}


def _raters(phrase: str, present: Sequence[_Said]) -> int:
    return len({each.saying.subject for each in present if each.saying.label is False and phrase in each.phrases})


def _rating(said: _Said, damned: dict[str, tuple[int, int]]) -> str:
    if said.saying.label is not False or not damned:
        return ""
    found = max(said.phrases & damned.keys(), key=len, default="")
    return (
        f"{damned[found][0]} of {damned[found][1]} ratings of {found!r} are bad, far more than before" if found else ""
    )


def chance(count: int, total: int, share: float) -> float:
    """At most this is the chance that `count` of `total` or more fall on the present (Chernoff)."""
    if count <= share * total:
        return 1.0
    rate = count / total
    apart = rate * math.log(rate / share) + ((1 - rate) * math.log((1 - rate) / (1 - share)) if rate < 1 else 0.0)
    return math.exp(-total * apart)


def _phrase(said: _Said, surging: dict[str, int], present: int) -> str:
    found = max(said.phrases & surging.keys(), key=len, default="") if surging else ""
    return f"{surging[found]} of {present} records say {found!r}, far more than ever before" if found else ""


def _phrases(text: str) -> set[str]:
    words = _WORD.findall(text.casefold())
    return {" ".join(words[start : start + run]) for run in RUNS for start in range(len(words) - run + 1)}
