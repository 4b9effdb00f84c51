"""The latest k: rehearsal of the recent past, which forgets the distant one on purpose."""

from collections.abc import Iterator

from buffers.policy import Buffer, Candidate, Past


def ring(past: Past, _: Buffer) -> Iterator[Candidate]:
    """The latest update first, within it what came in last."""
    return past.ordered("update_number DESC, id DESC")
