"""A uniform sample of everything that was learned.

Every row carries a uniform random weight from its content hash: the k largest are a uniform sample of all rows seen so
far, and adding a row evicts at most one (Efraimidis & Spirakis 2006, with equal weights; the outcome is Vitter's 1985).
"""

from collections.abc import Iterator

from buffers.policy import Buffer, Candidate, Past


def reservoir(past: Past, _: Buffer) -> Iterator[Candidate]:
    """By weight. Read from an index: asking for k of them touches k rows."""
    return past.ordered("weight DESC, id")
