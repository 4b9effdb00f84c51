"""The contract of a buffer policy: in which order learned examples deserve a place in the replay buffer.

A policy is a query over the journal and keeps nothing of its own, so the buffer is bounded, seeded by the content
hashes, the same whenever it is asked for, and what an erasure or a rollback takes out of the journal is out of the
buffer too. `buffers.replay_buffer` walks the order from its start and admits examples until the buffer is full.
"""

import sqlite3
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

import msgspec


class Buffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model keeps of the past. To resize it or to change its policy, change the key: nothing is copied."""

    policy: Literal["reservoir", "ring", "balanced", "surprise"] = "reservoir"
    """A uniform sample, the latest, equally many of each group, or those with the highest loss beside a sample."""
    examples: Annotated[int, msgspec.Meta(ge=1)] = 2000
    """It holds at most so many; what is beyond is not rehearsed."""
    balance_by: Literal["collection", "source", "subject", "shape"] = "collection"
    """`balanced`: what makes a group."""
    uniform_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    """`surprise`: share of the uniform sample."""
    subject_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.005
    """One subject has at most this share of the places (at least one), however much it says."""
    ttl_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Examples that came in longer ago are not rehearsed any more; counted back from the newest of the update."""


class Candidate(NamedTuple):
    """One learned example that may have a place."""

    id: int
    subject: str | None


class Past(NamedTuple):
    """The learned training examples of a model, those that have outlived their time left out."""

    connection: sqlite3.Connection
    model: str
    since: float | None = None
    """Seconds since the epoch; None: all of them."""

    def ordered(self, by: str) -> Iterator[Candidate]:
        """Read lazily in an order given as SQL; it must be total, or two readings may differ."""
        since = "" if self.since is None else " AND ingested_at >= ?"
        found = self.connection.execute(
            "SELECT id, subject FROM example WHERE model = ? AND split = 'train' AND state = 'consumed'"
            f"{since} ORDER BY {by}",
            (self.model,) if self.since is None else (self.model, self.since),
        )
        return (Candidate(*row) for row in found)


Policy = Callable[[Past, Buffer], Iterator[Candidate]]
"""All of the past, the worthiest first. An example may come up twice; it gets one place."""
