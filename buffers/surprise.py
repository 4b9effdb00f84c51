"""What the model found hardest when it last saw it, mixed with a uniform sample.

Losses are those that the trainer reported after the last update in which an example was new or replayed. The uniform
part is there because the highest losses are also where mistakes and noise gather; examples without a loss come last.
"""

from collections.abc import Iterator

from buffers.policy import Buffer, Candidate, Past


def surprise(past: Past, buffer: Buffer) -> Iterator[Candidate]:
    """Drawn from both orders in turn, so that at every length each has its share."""
    uniform, hardest = past.ordered("weight DESC, id"), past.ordered("loss IS NULL, loss DESC, weight DESC, id")
    owed = 0.0
    while True:
        owed += buffer.uniform_share
        candidate = next(uniform if owed >= 1 else hardest, None)
        if candidate is None:
            break
        owed -= owed >= 1
        yield candidate
    # each of the two is all of the past: when one has ended, nothing is missing
