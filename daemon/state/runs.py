"""Runs and versions: their rows, and the only legal moves between states, each with its audit row."""

import time
from typing import Any, Literal, get_args

import msgspec

from buffers import claims
from daemon.state import audit
from daemon.state.database import Connection

RunState = Literal[
    "PENDING", "TRAINING", "TRAINED", "EVALUATING", "ACCEPTED", "PUBLISHED", "CANARY", "LIVE", "SUPERSEDED",
    "REJECTED", "FAILED", "CANCELLED", "ROLLED_BACK",
]  # fmt: skip
ACTIVE: tuple[RunState, ...] = ("PENDING", "TRAINING", "TRAINED", "EVALUATING", "ACCEPTED", "PUBLISHED", "CANARY")
MOVES: dict[RunState, tuple[RunState, ...]] = {
    "PENDING": ("TRAINING", "FAILED", "CANCELLED"),
    "TRAINING": ("TRAINED", "PENDING", "FAILED", "CANCELLED"),
    "TRAINED": ("EVALUATING", "FAILED", "CANCELLED"),
    "EVALUATING": ("ACCEPTED", "REJECTED", "FAILED", "CANCELLED"),
    "ACCEPTED": ("PUBLISHED", "FAILED", "CANCELLED"),
    "PUBLISHED": ("CANARY", "LIVE", "FAILED", "CANCELLED"),
    "CANARY": ("LIVE", "ROLLED_BACK", "FAILED", "CANCELLED"),
    "LIVE": ("SUPERSEDED", "ROLLED_BACK"),
    "SUPERSEDED": ("LIVE", "ROLLED_BACK"),
    "ROLLED_BACK": ("LIVE", "SUPERSEDED"),
    "REJECTED": (), "FAILED": (), "CANCELLED": (),
}  # fmt: skip
assert set(MOVES) == set(get_args(RunState))


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at an update."""

    id: str
    model: str
    state: RunState
    trigger: str
    reason: str
    update_number: int
    parent_version: int | None
    version: int | None
    attempts: int
    pid: int | None
    created_at: float
    updated_at: float
    cut: dict[str, Any] | None
    verdict: dict[str, Any] | None


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A published adapter."""

    model: str
    number: int
    run_id: str
    parent: int | None
    state: str
    manifest_sha256: str
    published_at: float
    activated_at: float | None
    activation: dict[str, Any] | None


class IllegalMove(Exception):
    """A run may not go from its state to that one: somebody else moved it first."""


_RUN = ", ".join(Run.__struct_fields__)
_VERSION = ", ".join(Version.__struct_fields__)


def _run(row: tuple[Any, ...]) -> Run:
    fields = dict(zip(Run.__struct_fields__, row, strict=True))
    for name in ("cut", "verdict"):
        fields[name] = None if fields[name] is None else msgspec.json.decode(fields[name])
    return Run(**fields)


def _version(row: tuple[Any, ...]) -> Version:
    fields = dict(zip(Version.__struct_fields__, row, strict=True))
    fields["activation"] = None if fields["activation"] is None else msgspec.json.decode(fields["activation"])
    return Version(**fields)


def create(
    connection: Connection, model: str, trigger: str, parent_version: int | None, examples_max: int,
    share: claims.Share | None = None,
) -> Run | None:  # fmt: skip
    """A PENDING run that has claimed what waits, or None when nothing does. Inside the caller's transaction.

    Its update number counts the versions that were made, so a failed run's number is used again.
    """
    number = (
        1
        + connection.execute(
            "SELECT coalesce(max(update_number), 0) FROM run WHERE model = ? AND version IS NOT NULL", (model,)
        ).fetchone()[0]
    )
    total = connection.execute("SELECT count(*) FROM run WHERE model = ?", (model,)).fetchone()[0]
    identity, now = f"{model}-{total + 1:05d}", time.time()
    if not claims.claim(connection, model, identity, examples_max, share):
        return None
    connection.execute(
        "INSERT INTO run (id, model, state, trigger, update_number, parent_version, created_at, updated_at)"
        " VALUES (?, ?, 'PENDING', ?, ?, ?, ?, ?)",
        (identity, model, trigger, number, parent_version, now, now),
    )
    audit.write(connection, "run.PENDING", identity, {"trigger": trigger})
    return get(connection, identity)


def get(connection: Connection, run_id: str) -> Run:
    """One run; raises `KeyError` with its id."""
    row = connection.execute(f"SELECT {_RUN} FROM run WHERE id = ?", (run_id,)).fetchone()
    if row is None:
        raise KeyError(run_id)
    return _run(row)


def active(connection: Connection) -> list[Run]:
    """Runs that are not at an end, oldest first."""
    marks = ", ".join("?" * len(ACTIVE))
    rows = connection.execute(f"SELECT {_RUN} FROM run WHERE state IN ({marks}) ORDER BY created_at", ACTIVE)
    return [_run(row) for row in rows]


def recent(connection: Connection, model: str | None = None, limit: int = 20) -> list[Run]:
    """The latest runs, newest first."""
    rows = connection.execute(
        f"SELECT {_RUN} FROM run WHERE ? IS NULL OR model = ? ORDER BY created_at DESC, id DESC LIMIT ?",
        (model, model, limit),
    )
    return [_run(row) for row in rows]


def move(
    connection: Connection, run: Run, to: RunState, reason: str = "", at: float | None = None, **columns: Any
) -> Run:
    """Move a run and write the audit row, inside the caller's transaction.

    `columns` are set with it (`pid=...`, `cut=...`). Raises `IllegalMove` when the run is no longer in `run.state`.
    """
    if to not in MOVES[run.state]:
        raise IllegalMove(f"run {run.id}: {run.state} -> {to}")
    for name in ("cut", "verdict"):
        if columns.get(name) is not None:
            columns[name] = msgspec.json.encode(columns[name]).decode()
    assignments = "".join(f", {name} = ?" for name in columns)
    changed = connection.execute(
        f"UPDATE run SET state = ?, reason = ?, updated_at = ?{assignments} WHERE id = ? AND state = ?",
        (to, reason, time.time() if at is None else at, *columns.values(), run.id, run.state),
    ).rowcount
    if not changed:
        raise IllegalMove(f"run {run.id} is no longer {run.state}")
    audit.write(
        connection, f"run.{to}", run.id, {"from": run.state, "reason": reason} if reason else {"from": run.state}
    )
    return get(connection, run.id)


def annotate(connection: Connection, run: Run, cut: msgspec.Struct) -> None:
    """Keep what the experience of a run consists of. In the caller's transaction."""
    connection.execute("UPDATE run SET cut = ? WHERE id = ?", (msgspec.json.encode(cut).decode(), run.id))


def publish(connection: Connection, run: Run, number: int, manifest_sha256: str) -> None:
    """The row of a new version, inside the caller's transaction."""
    connection.execute(
        "INSERT INTO version (model, number, run_id, parent, state, manifest_sha256, published_at)"
        " VALUES (?, ?, ?, ?, 'published', ?, ?)",
        (run.model, number, run.id, run.parent_version, manifest_sha256, time.time()),
    )
    audit.write(connection, "version.published", f"{run.model}@{number:04d}", {"manifest_sha256": manifest_sha256})


def next_version(connection: Connection, model: str) -> int:
    """Numbers are never used twice, not even after a rollback."""
    row = connection.execute("SELECT coalesce(max(number), 0) + 1 FROM version WHERE model = ?", (model,)).fetchone()
    return int(row[0])


def versions(connection: Connection, model: str | None = None) -> list[Version]:
    """Every version, newest first."""
    rows = connection.execute(
        f"SELECT {_VERSION} FROM version WHERE ? IS NULL OR model = ? ORDER BY model, number DESC", (model, model)
    )
    return [_version(row) for row in rows]


def live_version(connection: Connection, model: str) -> Version | None:
    """What the model should be served with: the desired version, whatever an engine says."""
    row = connection.execute(f"SELECT {_VERSION} FROM version WHERE model = ? AND state = 'live'", (model,)).fetchone()
    return None if row is None else _version(row)


def serve(
    connection: Connection,
    model: str,
    number: int | None,
    *,
    activation: dict[str, Any] | None = None,
    actor: str = "eternad",
) -> None:
    """Make `number` the desired version (None: the base). In the caller's transaction.

    A version and its ancestors are what the model then knows: their examples are rehearsed, those of all other
    versions (rolled back, or made on another branch) are set aside. An update, a rollback and a roll forward are all
    this one change.
    """
    every = {version.number: version for version in versions(connection, model)}
    known = _lineage(every, number)
    for version in every.values():
        state = "live" if version.number == number else "superseded" if version.number in known else "rolled_back"
        if version.state not in (state, "removed", "failed", "published") or version.number == number:
            _retire(connection, version, state)
    if number is not None:
        connection.execute(
            "UPDATE version SET activated_at = ?, activation = coalesce(?, activation) WHERE model = ? AND number = ?",
            (time.time(), None if activation is None else msgspec.json.encode(activation).decode(), model, number),
        )
    audit.write(connection, "version.live", f"{model}@{number or 0:04d}", activation, actor)


def _lineage(every: dict[int, Version], number: int | None) -> set[int]:
    known: set[int] = set()
    while number is not None and number in every:
        known.add(number)
        number = every[number].parent
    return known


_RUN_STATE: dict[str, RunState] = {"live": "LIVE", "superseded": "SUPERSEDED", "rolled_back": "ROLLED_BACK"}


def _retire(connection: Connection, version: Version, state: str) -> None:
    """Give a version another state, and its run and examples with it."""
    connection.execute(
        "UPDATE version SET state = ? WHERE model = ? AND number = ?", (state, version.model, version.number)
    )
    (claims.set_aside if state == "rolled_back" else claims.restore)(connection, version.run_id)
    run = get(connection, version.run_id)
    if run.state != _RUN_STATE[state] and run.state != "PUBLISHED":
        # why it was accepted and when it ended stay what they were
        move(connection, run, _RUN_STATE[state], run.reason, run.updated_at)


def set_version_state(connection: Connection, model: str, number: int, state: str) -> None:
    """For what `serve` does not decide: on trial, never served, files gone. In the caller's transaction."""
    connection.execute("UPDATE version SET state = ? WHERE model = ? AND number = ?", (state, model, number))
    audit.write(connection, f"version.{state}", f"{model}@{number:04d}")


def failures_in_a_row(connection: Connection, model: str) -> tuple[int, float]:
    """How many of the latest runs failed or were turned down without one that served between, and when the last did."""
    count, last = 0, 0.0
    served = {version.number for version in versions(connection, model) if version.activated_at is not None}
    for run in recent(connection, model, 20):
        is_turned_down = run.state == "ROLLED_BACK" and run.version not in served  # on trial with live requests
        if run.state not in ("FAILED", "REJECTED") and not is_turned_down:
            break
        count, last = count + 1, max(last, run.updated_at)
    return count, last
