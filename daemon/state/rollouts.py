"""Rollouts: which version is on trial with live requests, how far it has come, and how it has done."""

import time
from typing import Any, Literal

import msgspec

from daemon.rollout import Judgement, Kind, Rollout, Signals, Stage, stages
from daemon.state import audit, records, runs
from daemon.state.database import Connection

Ending = Literal["promoted", "rolled_back", "cancelled"]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One row: a version that answers a share of the requests, or did."""

    id: int
    model: str
    version: int
    stable: int | None
    is_first: bool
    is_held: bool
    settings: Rollout
    stage: int
    kind: Kind
    percent: float
    signals: Signals
    judgement: Judgement | None
    began_at: float
    stage_began_at: float
    record_from: int
    ended_at: float | None
    outcome: Ending | None
    reason: str

    @property
    def plan(self) -> list[Stage]:
        """All stages, as the configuration was when it began."""
        return stages(self.settings)


class Contested(Exception):
    """Somebody else has ended or moved the rollout meanwhile; the message says what is the case now."""


_COLUMNS = ", ".join(Trial.__struct_fields__)


def _trial(row: tuple[Any, ...]) -> Trial:
    fields = dict(zip(Trial.__struct_fields__, row, strict=True))
    for name in ("settings", "signals", "judgement"):
        fields[name] = None if fields[name] is None else msgspec.json.decode(fields[name])
    return msgspec.convert(fields, Trial, strict=False)


def current(connection: Connection, model: str) -> Trial | None:
    """The one that is at work."""
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM rollout WHERE model = ? AND ended_at IS NULL", (model,)
    ).fetchone()  # fmt: skip
    return None if row is None else _trial(row)


def latest(connection: Connection, model: str, limit: int = 20) -> list[Trial]:
    """The last ones, newest first."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM rollout WHERE model = ? ORDER BY id DESC LIMIT ?", (model, limit)
    )
    return [_trial(row) for row in rows]


def begin(
    connection: Connection,
    model: str,
    version: int,
    stable: int | None,
    settings: Rollout,
    stage: Stage,
    *,
    is_first: bool,
    is_held: bool = False,
    actor: str = "eternad",
) -> Trial:
    """In the caller's transaction. Raises `Contested` when another version of the model is on trial."""
    if (found := current(connection, model)) is not None:
        raise Contested(f"version {found.version} of {model} is on trial: promote it or roll it back first")
    now = time.time()
    connection.execute(
        "INSERT INTO rollout (model, version, stable, is_first, is_held, settings, stage, kind, percent, signals,"
        " began_at, stage_began_at, record_from) VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?, ?, ?, ?, ?)",
        (
            model, version, stable, is_first, is_held, _json(settings), stage.kind, stage.percent, _json(Signals()),
            now, now, records.latest_row(connection),
        ),
    )  # fmt: skip
    audit.write(connection, f"rollout.{stage.kind}", f"{model}@{version:04d}", {"percent": stage.percent}, actor)
    return _present(connection, model)


def step(
    connection: Connection, trial: Trial, number: int, stage: Stage, *, is_held: bool = False, actor: str = "eternad"
) -> Trial:
    """The next stage, or the share that an operator chose; counting begins anew. In the caller's transaction."""
    _change(
        connection, trial, stage=number, kind=stage.kind, percent=stage.percent, is_held=is_held, judgement=None,
        signals=_json(Signals()), stage_began_at=time.time(), record_from=records.latest_row(connection),
    )  # fmt: skip
    audit.write(connection, f"rollout.{stage.kind}", _name(trial), {"percent": stage.percent}, actor)
    return _present(connection, trial.model)


def note(connection: Connection, trial: Trial, signals: Signals, judgement: Judgement) -> None:
    """Keep what has been counted: a restart goes on with it. In the caller's transaction."""
    _change(connection, trial, signals=_json(signals), judgement=_json(judgement))


def end(connection: Connection, trial: Trial, outcome: Ending, reason: str, actor: str = "eternad") -> None:
    """In the caller's transaction."""
    _change(connection, trial, ended_at=time.time(), outcome=outcome, reason=reason)
    audit.write(connection, f"rollout.{outcome}", _name(trial), {"reason": reason}, actor)


def end_of(
    connection: Connection, model: str, version: int | None, outcome: Ending, reason: str, actor: str = "eternad"
) -> None:
    """The same for whatever trial of this version is at work, if any."""
    trial = current(connection, model)
    if trial is not None and trial.version == version:
        end(connection, trial, outcome, reason, actor)


def run_of(connection: Connection, trial: Trial) -> runs.Run:
    """The run that made the version."""
    found = next(each for each in runs.versions(connection, trial.model) if each.number == trial.version)
    return runs.get(connection, found.run_id)


def _change(connection: Connection, trial: Trial, **columns: Any) -> None:
    """Raises `Contested` unless the row is open, at the stage and share that the caller has seen."""
    assignments = ", ".join(f"{name} = ?" for name in columns)
    changed = connection.execute(
        f"UPDATE rollout SET {assignments} WHERE id = ? AND ended_at IS NULL AND kind = ? AND percent = ?",
        (*columns.values(), trial.id, trial.kind, trial.percent),
    ).rowcount
    if not changed:
        raise Contested(f"the rollout of {_name(trial)} has been moved or ended meanwhile; see: eternad status")


def _present(connection: Connection, model: str) -> Trial:
    found = current(connection, model)
    assert found is not None  # written a moment ago, in the same transaction
    return found


def _name(trial: Trial) -> str:
    return f"{trial.model}@{trial.version:04d}"


def _json(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()
