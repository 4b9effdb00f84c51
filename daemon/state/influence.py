"""Who shaped a version: the examples that it and its ancestors were trained on, by source, subject and collection."""

from typing import Literal, get_args

import msgspec

from daemon.state import runs
from daemon.state.database import Connection

By = Literal["source", "subject", "collection", "shape"]


class Part(msgspec.Struct, frozen=True):
    """What one origin has given."""

    name: str
    """Empty: content that writers dropped, which has no source and no subject."""
    examples: int
    share: float
    """Of all examples; 0 to 1."""
    here: int
    """How many of them were new in this version; the others came with its ancestors."""


class Influence(msgspec.Struct, frozen=True, kw_only=True):
    """The report of `eternad influence`."""

    model: str
    version: int
    lineage: list[int]
    """The version and its ancestors, newest first."""
    examples: int
    here: int
    """New in this version."""
    by: dict[str, list[Part]]
    """Each the largest first."""


def of_version(connection: Connection, model: str, number: int, limit: int) -> Influence:
    """What shaped a version, the `limit` largest of each kind; raises `KeyError` for a version that is not known."""
    every = {version.number: version for version in runs.versions(connection, model)}
    lineage: list[int] = []
    at: int | None = every[number].number
    while at is not None and at in every:
        lineage.append(at)
        at = every[at].parent
    runs_of = [every[each].run_id for each in lineage]
    return Influence(
        model=model,
        version=number,
        lineage=lineage,
        examples=_count(connection, model, runs_of),
        here=_count(connection, model, runs_of[:1]),
        by={each: _parts(connection, model, runs_of, each, limit) for each in get_args(By)},
    )


_TRAINED = "model = ? AND split = 'train' AND update_number IS NOT NULL AND run_id IN (SELECT value FROM json_each(?))"


def _count(connection: Connection, model: str, runs_of: list[str]) -> int:
    wanted = msgspec.json.encode(runs_of).decode()
    row = connection.execute(f"SELECT count(*) FROM example WHERE {_TRAINED}", (model, wanted)).fetchone()
    return int(row[0])


def _parts(connection: Connection, model: str, runs_of: list[str], by: By, limit: int) -> list[Part]:
    wanted = msgspec.json.encode(runs_of).decode()
    rows = connection.execute(
        f"SELECT coalesce({by}, ''), count(*), count(*) * 1.0 / sum(count(*)) OVER (), sum(run_id = ?)"
        f" FROM example WHERE {_TRAINED} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?",
        (runs_of[0], model, wanted, limit),
    )
    return [Part(str(name), int(number), float(share), int(here)) for name, number, share, here in rows]
