"""Which examples say nearly the same: MinHash bands find the few to compare, exact Jaccard decides.

Compared is what the model is to say, in runs of five characters; an answer of few words says nothing without its
question, so there both are compared. MinHash: Broder 1997; cut into bands of rows (LSH), two texts of likeness s meet
with the probability 1 - (1 - s^ROWS)^BANDS: 0.93 at 0.8, 0.995 at 0.9, 0.006 at 0.2. The hashing is rensa's.
"""

import re
from collections.abc import Collection, Set
from hashlib import blake2b

from buffers.example import Example

ROWS, BANDS = 4, 5
RUN = 5
ALONE_WORDS = 5
"""An answer with so many words is compared without its question: many questions must not smuggle in one answer."""
CHARACTERS_MAX = 4000
"""Of a longer text the beginning stands for the whole."""
_WORD = re.compile(r"\w+")
_SEED = 20261122


def said(example: Example) -> str:
    """What an example makes the model say, in lower case without punctuation."""
    words = _WORD.findall(example.completion[:CHARACTERS_MAX].casefold())
    if len(words) < ALONE_WORDS:
        words = [*_WORD.findall(asked(example)[:CHARACTERS_MAX].casefold()), *words]
    return " ".join(words)


def asked(example: Example) -> str:
    """The question: the last thing that a user says."""
    if isinstance(example.prompt, str):
        return example.prompt
    return next((each.content for each in reversed(example.prompt) if each.role == "user"), "")


def bands(model: str, text: str) -> list[int]:
    """56-bit keys of a text: texts that are alike share one of them."""
    return keys(model, runs(text))


def keys(model: str, parts: Collection[str]) -> list[int]:
    """The bands of a text by its runs."""
    from rensa import RMinHash  # type: ignore[attr-defined]  # lazily: 1 MiB, needed where something is taken in

    minhash = RMinHash(num_perm=ROWS * BANDS, seed=_SEED)
    minhash.update(list(parts))
    digest = minhash.digest()
    return [_key(model, band, digest[band * ROWS : (band + 1) * ROWS]) for band in range(BANDS)]


def _key(model: str, band: int, rows: list[int]) -> int:
    data = f"{model}/{band}/{rows}".encode()
    return int.from_bytes(blake2b(data, digest_size=7).digest())


def likeness(one: str, other: str) -> float:
    """Jaccard similarity of two texts as `said` gives them, 0 to 1."""
    return 1.0 if one == other else overlap(runs(one), runs(other))


def overlap(first: Set[str], second: Set[str]) -> float:
    """Jaccard similarity of the runs of two texts, 0 to 1."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def runs(text: str) -> Set[str]:
    """All runs of `RUN` characters; a shorter text is one itself."""
    return {text[start : start + RUN] for start in range(max(len(text) - RUN + 1, 1))}
