"""A contaminated evaluation is worse than none: what shares 13 words in a row with `eval/` is not trained on.

13-grams of words, as GPT-3 was decontaminated (Brown et al., arXiv:2005.14165, appendix C). Compared is what a model is
to say, not what it is asked: system prompts and canned questions are shared by everything. An answer that is shorter
than 13 words is compared as a whole, together with its question.
"""

import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from buffers.example import Example, Origin
from daemon.state import eval_grams
from daemon.state.database import Connection

WORDS = 13
_WORD = re.compile(r"\w+")
Item = tuple[Example, Origin]


def grams(example: Example) -> set[int]:
    """56-bit hashes of what an example says."""
    words = _WORD.findall(example.completion.casefold())
    if len(words) < WORDS:
        return {_hash([*_WORD.findall(_asked(example).casefold()), "\n", *words])}
    return {_hash(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


def _asked(example: Example) -> str:
    if isinstance(example.prompt, str):
        return example.prompt
    return next((each.content for each in reversed(example.prompt) if each.role == "user"), "")


def _hash(words: list[str]) -> int:
    return int.from_bytes(blake2b(" ".join(words).encode(), digest_size=7).digest())


def remember(connection: Connection, model: str, items: Iterable[Item]) -> Iterator[Item]:
    """Pass evaluation examples on, and note what they say, inside the caller's transaction."""
    for item in items:
        eval_grams.add(connection, model, grams(item[0]))
        yield item


def clean(connection: Connection, model: str, items: Iterable[Item], dropped: list[Item]) -> Iterator[Item]:
    """Pass on what does not stand in `eval/`; the rest goes to `dropped`."""
    if eval_grams.is_empty(connection, model):
        yield from items
        return
    for item in items:
        if eval_grams.meets(connection, model, grams(item[0])):
            dropped.append(item)
        else:
            yield item
