"""Equally many examples of each collection, source, subject or shape: a large drop does not crowd out a small one.

A group that is smaller than its share is kept whole, and the others divide what it leaves. Greedy class balancing
(GDumb, Prabhu et al. 2020) in one query: each group in its own reservoir order, then round by round over the groups.
"""

from collections.abc import Iterator

from buffers.policy import Buffer, Candidate, Past


def balanced(past: Past, buffer: Buffer) -> Iterator[Candidate]:
    """The first of every group, then the second of every group, and so on."""
    group = buffer.balance_by  # one of four column names: the configuration allows nothing else
    return past.ordered(f"row_number() OVER (PARTITION BY {group} ORDER BY weight DESC, id), weight DESC, id")
