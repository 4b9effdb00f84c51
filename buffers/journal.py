"""The append-only table of every accepted example, per model.

Exact de-duplication (a second copy of an example is counted, not stored) and a hold-out that is fixed at ingest:
whether an example is ever trained on is decided once, in the transaction that stores it. Every function works inside
the caller's transaction, so that rows, file offsets and markers become durable together.
"""

import sqlite3
import time
from collections.abc import Iterable
from itertools import islice
from typing import Protocol

import msgspec

from buffers.example import Example, Origin, Split, canonical, content_hash, prompt_hash, reservoir_weight

MIGRATIONS: list[tuple[str, str]] = [
    (
        "journal-1",
        """
        CREATE TABLE example (
          id INTEGER PRIMARY KEY AUTOINCREMENT,
          model TEXT NOT NULL,
          hash TEXT NOT NULL,                 -- SHA-256 of the canonical form
          prompt_hash TEXT NOT NULL,
          shape TEXT NOT NULL,
          body BLOB NOT NULL,                 -- the canonical form
          characters INTEGER NOT NULL,
          split TEXT NOT NULL CHECK (split IN ('train', 'heldout', 'eval')),
          state TEXT NOT NULL DEFAULT 'pending' CHECK (
            state IN ('pending', 'claimed', 'consumed', 'rejected', 'retracted')),
          run_id TEXT,                        -- the run that claims or consumed it
          update_number INTEGER,              -- the update in which it was new
          collection TEXT NOT NULL DEFAULT '',
          source TEXT NOT NULL DEFAULT '',
          subject TEXT,
          record_id TEXT,
          origin_file TEXT NOT NULL DEFAULT '',
          origin_line INTEGER NOT NULL DEFAULT 0,
          weight REAL NOT NULL,               -- uniform in (0, 1): the key of the reservoir
          failures INTEGER NOT NULL DEFAULT 0,
          copies INTEGER NOT NULL DEFAULT 1,
          ingested_at REAL NOT NULL,
          UNIQUE (model, hash)
        );
        CREATE INDEX example_pending ON example (model, state, split, id);
        CREATE INDEX example_memory ON example (model, split, weight) WHERE state = 'consumed';
        CREATE INDEX example_update ON example (model, update_number, split, weight) WHERE state = 'consumed';
        CREATE INDEX example_prompt ON example (model, prompt_hash);
        CREATE INDEX example_record ON example (model, record_id) WHERE record_id IS NOT NULL;
        CREATE INDEX example_subject ON example (subject) WHERE subject IS NOT NULL;
        CREATE INDEX example_run ON example (run_id) WHERE run_id IS NOT NULL;
        """,
    ),
    (
        "journal-2",
        """
        CREATE TABLE intake (                 -- running totals: counting a million rows at every tick is too slow
          model TEXT PRIMARY KEY,
          distinct_examples INTEGER NOT NULL DEFAULT 0,
          heldout INTEGER NOT NULL DEFAULT 0,
          duplicates INTEGER NOT NULL DEFAULT 0
        );
        """,
    ),
    (
        "journal-3",
        """
        ALTER TABLE example ADD COLUMN loss REAL; -- nats per token when an update last trained on it
        """,
    ),
    (
        "journal-tokens",
        """
        ALTER TABLE example ADD COLUMN tokens INTEGER; -- as the trainer that learned it counted them
        """,
    ),
]


CHUNK = 500
"""So many examples are looked up at once."""


class Added(msgspec.Struct):
    """What became of the examples that were handed to `add`."""

    new: int = 0
    duplicates: int = 0
    heldout: int = 0
    ids: list[int] = msgspec.field(default_factory=list)  # row of each example, in order; duplicates give the first


class Kin(Protocol):
    """Knows which stored examples say nearly the same as one that comes in."""

    def expect(self, examples: Iterable[Example]) -> None:
        """These are asked about next: look them up together."""

    def side(self, example: Example) -> str | None:
        """The side of the hold-out on which one stands that an evaluation could not tell apart; None without one."""

    def note(self, example: Example, example_id: int, split: str) -> None:
        """An example was stored."""

    def flush(self) -> None:
        """That was all: write what was noted."""


def add(
    connection: sqlite3.Connection,
    model: str,
    items: Iterable[tuple[Example, Origin]],
    *,
    heldout_fraction: float,
    split: Split | None = None,
    now: float | None = None,
    kin: Kin | None = None,
) -> Added:
    """Store examples, each once. `split` forces a side (`eval/` files); else the hold-out takes its fraction.

    The hold-out is systematic: an example goes there whenever the share held out so far is below the fraction, so that
    ten examples at 0.1 always give one. An example that asks what a stored one asks joins its side, and so does one
    that says what a stored one says, as far as `kin` can tell: nothing that is tested on is trained on.
    """
    now = time.time() if now is None else now
    adding = _Adding(connection, model, heldout_fraction, split, now, kin)
    rest = iter(items)
    while chunk := list(islice(rest, CHUNK)):
        adding.add(chunk)
    adding.end()
    return adding.added


class _Adding:
    """One call of `add`, chunk by chunk: what is known of a whole chunk is looked up at once."""

    def __init__(
        self, connection: sqlite3.Connection, model: str, fraction: float, split: Split | None, now: float,
        kin: Kin | None,
    ) -> None:  # fmt: skip
        self._connection, self._model, self._fraction = connection, model, fraction
        self._split, self._now, self._kin = split, now, kin
        self.added = Added()
        totals = connection.execute(
            "SELECT distinct_examples, heldout FROM intake WHERE model = ?", (model,)
        ).fetchone() or (0, 0)
        self._distinct, self._heldout = int(totals[0]), int(totals[1])
        self._start = (self._distinct, self._heldout)

    def add(self, chunk: list[tuple[Example, Origin]]) -> None:
        """Store a chunk."""
        digests = [content_hash(example) for example, _ in chunk]
        ids = _ids(self._connection, self._model, digests)
        fresh = [example for (example, _), digest in zip(chunk, digests, strict=True) if digest not in ids]
        asked = {prompt_hash(example) for example in fresh}
        sides = _sides(self._connection, self._model, asked)
        if self._kin is not None and self._split != "eval":
            self._kin.expect(fresh)
        for (example, origin), digest in zip(chunk, digests, strict=True):
            if digest in ids:
                self._connection.execute("UPDATE example SET copies = copies + 1 WHERE id = ?", (ids[digest],))
                self.added.duplicates += 1
            else:
                ids[digest] = self._store(example, origin, digest, sides)
            self.added.ids.append(ids[digest])

    def _store(self, example: Example, origin: Origin, digest: str, sides: dict[str, str]) -> int:
        asked = prompt_hash(example)
        side = self._split or self._joined(example, sides.get(asked))
        side = side or _next(self._distinct, self._heldout, self._fraction)
        sides.setdefault(asked, side)
        cursor = self._connection.execute(
            "INSERT INTO example (model, hash, prompt_hash, shape, body, characters, split, collection, source,"
            " subject, record_id, origin_file, origin_line, weight, ingested_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._model, digest, asked, example.shape, canonical(example),
                len(example.completion) + _length(example), side, origin.collection, origin.source, origin.subject,
                origin.record_id, origin.file, origin.line, reservoir_weight(digest), self._now,
            ),
        )  # fmt: skip
        self.added.new += 1
        identity = int(cursor.lastrowid or 0)
        if side != "eval":
            if self._kin is not None:
                self._kin.note(example, identity, side)
            self._distinct += 1
            self._heldout += side == "heldout"
            self.added.heldout += side == "heldout"
        return identity

    def _joined(self, example: Example, side: str | None) -> Split | None:
        """The side of a stored example that an evaluation could not tell from this one."""
        found = side if side is not None else None if self._kin is None else self._kin.side(example)
        if found is None or found == "eval":
            return None
        return "heldout" if found == "heldout" else "train"

    def end(self) -> None:
        """Bring the running totals up to date."""
        if self._kin is not None:
            self._kin.flush()
        self._connection.execute(
            "INSERT INTO intake (model, distinct_examples, heldout, duplicates) VALUES (?, ?, ?, ?) ON CONFLICT (model)"
            " DO UPDATE SET distinct_examples = distinct_examples + excluded.distinct_examples,"
            " heldout = heldout + excluded.heldout, duplicates = duplicates + excluded.duplicates",
            (
                self._model, self._distinct - self._start[0], self._heldout - self._start[1], self.added.duplicates,
            ),
        )  # fmt: skip


def _ids(connection: sqlite3.Connection, model: str, digests: list[str]) -> dict[str, int]:
    """`{hash: row}` of those that are stored."""
    rows = connection.execute(
        "SELECT hash, id FROM example WHERE model = ? AND hash IN (SELECT value FROM json_each(?))",
        (model, msgspec.json.encode(digests).decode()),
    )
    return dict(rows.fetchall())


def _sides(connection: sqlite3.Connection, model: str, asked: set[str]) -> dict[str, str]:
    """`{prompt hash: split}` of an example that asks the same."""
    rows = connection.execute(
        "SELECT value, (SELECT split FROM example WHERE model = ? AND prompt_hash = value LIMIT 1) FROM json_each(?)",
        (model, msgspec.json.encode(list(asked)).decode()),
    )
    return {str(prompt): str(split) for prompt, split in rows if split is not None}


def _length(example: Example) -> int:
    if isinstance(example.prompt, str):
        return len(example.prompt)
    return sum(len(message.content) for message in example.prompt)


def _next(distinct: int, heldout: int, fraction: float) -> Split:
    # the middle of each stride, not its first example: a file's opening line is often its most important one
    return "heldout" if heldout < int(fraction * (distinct + 1) + 0.5) and distinct > 0 else "train"


def remember_losses(connection: sqlite3.Connection, losses: Iterable[tuple[int, float]]) -> None:
    """Keep (row, nats per token) of the examples that an update has trained on: what the policy `surprise` goes by."""
    connection.executemany("UPDATE example SET loss = ? WHERE id = ?", ((loss, identity) for identity, loss in losses))


def remember_tokens(connection: sqlite3.Connection, tokens: Iterable[tuple[int, int]]) -> None:
    """Keep (row, tokens) of what an update has learned: what bounds a buffer by `tokens`."""
    connection.executemany(
        "UPDATE example SET tokens = ? WHERE id = ?", ((count, identity) for identity, count in tokens)
    )


def retract(connection: sqlite3.Connection, model: str, record_id: str) -> int:
    """Withdraw the example of a feedback record: never trained, tested or rehearsed again. Returns how many."""
    return connection.execute(
        "UPDATE example SET state = 'retracted' WHERE model = ? AND record_id = ? AND state <> 'retracted'",
        (model, record_id),
    ).rowcount


def counts(connection: sqlite3.Connection, model: str) -> dict[str, int]:
    """`{"train/pending": 3, ...}`: how many examples there are, by split and state."""
    rows = connection.execute(
        "SELECT split || '/' || state, count(*) FROM example WHERE model = ? GROUP BY 1 ORDER BY 1", (model,)
    )
    return {str(key): int(number) for key, number in rows}
