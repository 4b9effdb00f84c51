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

    policy: Literal["reservoir", "ring", "balanced", "surprise", "similarity"] = "reservoir"
    """A sample, the latest, equally many of each group, the highest losses, or what resembles the new the least."""
    examples: Annotated[int, msgspec.Meta(ge=1)] = 2000
    """It holds at most so many; what is beyond is not rehearsed."""
    tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """It holds at most so many tokens, as the trainer counted them."""
    bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """It holds at most so many bytes of examples as the journal stores them."""
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
    weight: float
    """Uniform in (0, 1)."""
    tokens: int
    """Counted by the trainer; before it has: a quarter of the bytes."""
    bytes: int


_COLUMNS = "id, subject, weight, coalesce(tokens, length(body) / 4 + 1), length(body)"
_LEARNED = "model = ? AND split = 'train' AND state = 'consumed'"


class Past(NamedTuple):
    """The learned training examples of a model, those that have outlived their time left out."""

    connection: sqlite3.Connection
    model: str
    since: float | None = None
    """Seconds since the epoch; None: all of them."""
    run_id: str | None = None
    """Of the run that is about to learn; None: as if nothing were new."""

    def ordered(self, by: str) -> Iterator[Candidate]:
        """Read lazily in an order given as SQL; it must be total, or two readings may differ."""
        return self._candidates("", (), by)

    def of_update(self, update: int) -> Iterator[Candidate]:
        """What one past update taught, by weight; read lazily from an index."""
        return self._candidates(" AND update_number = ?", (update,), "weight DESC, id")

    def _candidates(self, also: str, parameters: tuple[object, ...], by: str) -> Iterator[Candidate]:
        since = "" if self.since is None else " AND ingested_at >= ?"
        found = self.connection.execute(
            f"SELECT {_COLUMNS} FROM example WHERE {_LEARNED}{also}{since} ORDER BY {by}",
            (self.model, *parameters, *(() if self.since is None else (self.since,))),
        )
        return (Candidate(*row) for row in found)

    def updates(self) -> list[int]:
        """The past updates that still count, oldest first."""
        found = self.connection.execute(
            f"SELECT DISTINCT update_number FROM example WHERE {_LEARNED} ORDER BY 1", (self.model,)
        )
        return [int(row[0]) for row in found]

    def bodies_of(self, update: int, count: int) -> list[bytes]:
        """A uniform sample of what one update taught, in canonical form."""
        return self._bodies(f"{_LEARNED} AND update_number = ?", (self.model, update), count)

    def new_bodies(self, count: int) -> list[bytes]:
        """A uniform sample of what is about to be learned; without a run, of what was learned last."""
        if self.run_id is None:
            return self.bodies_of(max(self.updates(), default=0), count)
        return self._bodies("run_id = ? AND split = 'train'", (self.run_id,), count)

    def _bodies(self, where: str, parameters: tuple[object, ...], count: int) -> list[bytes]:
        found = self.connection.execute(
            f"SELECT body FROM example WHERE {where} ORDER BY weight DESC, id LIMIT ?", (*parameters, count)
        )
        return [row[0] for row in found]


Policy = Callable[[Past, Buffer], Iterator[Candidate]]
"""All of the past, the worthiest first. An example may come up twice; it gets one place."""
