"""What an operator sees at a glance, out of the database, the run directories and the running daemon.

The command line, the status page and the metrics all show this one structure.
"""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from daemon.config import Config
from daemon.rollout import Check
from daemon.state import rollouts, runs, summary
from daemon.state.database import Connection, setting
from daemon.state.waiting import waiting
from strategies.request import Progress, read_progress


class RunNow(msgspec.Struct, frozen=True, kw_only=True):
    """A run that is not at its end."""

    id: str
    state: str
    trigger: str
    created_at: float
    examples: dict[str, int] = {}
    progress: Progress | None = None


class LastRun(msgspec.Struct, frozen=True, kw_only=True):
    """The latest run that is at its end."""

    id: str
    state: str
    reason: str
    ended_at: float


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be learned next."""

    train: int
    heldout: int
    oldest_at: float | None
    newest_at: float | None
    reason: str
    """What the next update waits for."""


class TrialNow(msgspec.Struct, frozen=True, kw_only=True):
    """A version that answers a share of the requests."""

    version: int
    stable: int | None
    """What answers the others; None: the base."""
    kind: str
    """`canary`, or `shadow`: compared in the background."""
    percent: float
    stage: int
    """From 1."""
    stages: int
    held: bool
    """An operator chose the share and will end it."""
    began_at: float
    stage_began_at: float
    requests: int
    outcome: str
    """Of the latest look: `wait`, `pass` or `fail`."""
    reason: str
    checks: list[Check]


class ModelNow(msgspec.Struct, frozen=True, kw_only=True):
    """One model."""

    name: str
    live_version: int | None
    """The desired version; None: the base model."""
    live_since: float | None
    waiting: Waiting
    paused: bool
    run: RunNow | None
    last: LastRun | None
    engine: str
    engine_state: str
    """`unknown` while no daemon runs."""
    engine_serves: int | None
    engine_detail: str
    quarantined: int
    examples: dict[str, int]
    """`{"train/consumed": 12, ...}`"""
    trial: TrialNow | None = None
    search: str = ""
    """What a search for better settings is doing or proposes; empty when there is nothing to say."""


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """Everything."""

    at: float
    running: bool
    pid: int | None
    started_at: float | None
    library_directory: str
    state_directory: str
    disk_free_bytes: int
    disk_low: bool
    paused: bool
    """All models."""
    degraded: str
    """Why the library cannot be watched or the state not be written now; empty when both can."""
    models: list[ModelNow]
    quarantined: dict[str, int]
    """Entries by code."""


def collect(
    config: Config, connection: Connection, live: Mapping[str, Any] | None, now: float | None = None
) -> Overview:
    """Look at everything once. `live` is the daemon's snapshot (`control.Snapshot`), None when it does not run."""
    now = time.time() if now is None else now
    counts, paused = summary.quarantine_counts(connection), summary.paused(connection)
    by_code: dict[str, int] = {}
    for (_model, code), number in counts.items():
        by_code[code] = by_code.get(code, 0) + number
    free = _free_bytes(config.state_directory)
    return Overview(
        at=now,
        running=live is not None,
        pid=(live or {}).get("pid"),
        started_at=(live or {}).get("started_at"),
        library_directory=str(config.library_directory),
        state_directory=str(config.state_directory),
        disk_free_bytes=free,
        disk_low=free < config.disk_free_bytes_min,
        paused="" in paused,
        degraded=str((live or {}).get("degraded") or ""),
        models=[model_now(config, connection, name, live or {}, counts, paused, now) for name in sorted(config.models)],
        quarantined=by_code,
    )


def model_now(
    config: Config, connection: Connection, name: str, live: Mapping[str, Any],
    quarantined: Mapping[tuple[str, str], int], paused: set[str], now: float,
) -> ModelNow:  # fmt: skip
    """One model of `collect`."""
    model, version = config.models[name], runs.live_version(connection, name)
    engine = live.get("engines", {}).get(name, {})
    return ModelNow(
        name=name,
        live_version=None if version is None else version.number,
        live_since=None if version is None else version.activated_at,
        waiting=_waiting(connection, name, config, live, now),
        paused=bool(paused & {name, ""}),
        run=_run_now(config, connection, name),
        last=_last(connection, name),
        engine=model.engine,
        engine_state=engine.get("state", "unknown"),
        engine_serves=engine.get("serving"),
        engine_detail=engine.get("detail", ""),
        quarantined=sum(number for (owner, _code), number in quarantined.items() if owner == name),
        examples=summary.example_counts(connection, name),
        search=_search(config, connection, name),
    )


def _search(config: Config, connection: Connection, name: str) -> str:
    if reason := setting(connection, f"searching/{name}"):
        return f"searching for better settings ({reason})"
    if not (config.state_directory / "tuning" / name).is_dir():
        return ""  # most models: nothing needs to be imported
    from daemon.tuning.outcome import latest, open_changes

    found = latest(config.state_directory, name)
    if found is None or not open_changes(config.models[name], found):
        return ""
    return f"better settings were found: eternad tune {name} --accept"


def _waiting(connection: Connection, name: str, config: Config, live: Mapping[str, Any], now: float) -> Waiting:
    from daemon.schedule import explain, retry_at

    found = waiting(connection, name, config.trust)
    reason = explain(found, config.models[name].schedule, now, retry_at(*runs.failures_in_a_row(connection, name)))
    return Waiting(
        train=found.train, heldout=found.heldout, oldest_at=found.oldest_at, newest_at=found.newest_at,
        reason=live.get("waits_for", {}).get(name, reason),
    )  # fmt: skip


def _run_now(config: Config, connection: Connection, name: str) -> RunNow | None:
    run = next((run for run in runs.active(connection) if run.model == name), None)
    if run is None:
        return None
    return RunNow(
        id=run.id, state=run.state, trigger=run.trigger, created_at=run.created_at,
        examples=(run.cut or {}).get("rows", {}), progress=progress_of(config, run.id),
    )  # fmt: skip


def _trial_now(connection: Connection, name: str) -> TrialNow | None:
    trial = rollouts.current(connection, name)
    if trial is None:
        return None
    said = trial.judgement
    return TrialNow(
        version=trial.version, stable=trial.stable, kind=trial.kind, percent=trial.percent, stage=trial.stage + 1,
        stages=len(trial.plan), held=trial.is_held, began_at=trial.began_at, stage_began_at=trial.stage_began_at,
        requests=trial.signals.candidate.requests, outcome="wait" if said is None else said.outcome,
        reason="" if said is None else said.reason, checks=[] if said is None else said.checks,
    )  # fmt: skip


def progress_of(config: Config, run_id: str) -> Progress | None:
    """The training child's last word, None before the first one or while the file is not readable."""
    try:
        return read_progress(run_directory(config, run_id))
    except (OSError, msgspec.DecodeError):
        return None


def run_directory(config: Config, run_id: str) -> Path:
    """Where a run keeps its files."""
    return config.state_directory / "runs" / run_id


def _last(connection: Connection, name: str) -> LastRun | None:
    for run in runs.recent(connection, name):
        if run.state not in runs.ACTIVE:
            return LastRun(id=run.id, state=run.state, reason=run.reason, ended_at=run.updated_at)
    return None


def _free_bytes(directory: Path) -> int:
    """Of the nearest directory that exists."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return shutil.disk_usage(directory).free if os.access(directory, os.X_OK) else 0
