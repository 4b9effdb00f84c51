"""Hashes of the runs of words that stand in `eval/`, so that nothing of it is trained on."""

from collections.abc import Iterable

import msgspec

from daemon.state.database import Connection


def add(connection: Connection, model: str, hashes: Iterable[int]) -> None:
    """Note what an evaluation example consists of, inside the caller's transaction."""
    connection.executemany("INSERT OR IGNORE INTO eval_gram VALUES (?, ?)", ((model, each) for each in hashes))


def is_empty(connection: Connection, model: str) -> bool:
    """Whether a model has no evaluation examples of its own: then there is nothing to compare with."""
    return connection.execute("SELECT 1 FROM eval_gram WHERE model = ? LIMIT 1", (model,)).fetchone() is None


def meets(connection: Connection, model: str, hashes: Iterable[int]) -> bool:
    """Whether any of the hashes stands in `eval/`."""
    wanted = msgspec.json.encode(list(hashes)).decode()
    found = connection.execute(
        "SELECT 1 FROM eval_gram WHERE model = ? AND hash IN (SELECT value FROM json_each(?)) LIMIT 1", (model, wanted)
    )
    return found.fetchone() is not None
