"""What each page shows, gathered from the database and the run directories."""

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from buffers.inventory import Age, composition
from daemon import overview as glance
from daemon.config import Config
from daemon.state import audit, quarantine, records, summary
from daemon.state import runs as run_rows
from daemon.state.database import Connection
from daemon.state.reception import by_version
from daemon.state.runs import Run, Version
from strategies.request import RunReport, Shift, read_report

RUNS_SHOWN, ROWS_SHOWN, UPDATES_SHOWN = 200, 200, 20
POINTS = 400
"""A chart is 600 pixels wide: more points are only more bytes."""


def overview(config: Config, connection: Connection, live: Mapping[str, Any]) -> dict[str, Any]:
    """The front page."""
    return {
        "now": glance.collect(config, connection, live),
        "runs": run_rows.recent(connection, limit=10),
        "schedules": {name: model.schedule for name, model in config.models.items()},
    }


def runs_page(connection: Connection, model: str | None) -> dict[str, Any]:
    """The list of runs."""
    return {"runs": run_rows.recent(connection, model, RUNS_SHOWN), "model": model}


def quarantine_page(connection: Connection) -> dict[str, Any]:
    """The refusals, and what waits for review."""
    return {"rows": quarantine.rows(connection, ROWS_SHOWN), "held": records.held(connection, limit=ROWS_SHOWN)}


def log_page(connection: Connection) -> dict[str, Any]:
    """The audit log's end, newest first."""
    return {"entries": audit.entries(connection, ROWS_SHOWN)[::-1]}


def run(config: Config, connection: Connection, run_id: str) -> dict[str, Any] | None:
    """One run; None when there is no such run."""
    try:
        row = run_rows.get(connection, run_id)
    except KeyError:
        return None
    report = _report(config, run_id)
    return {
        "run": row, "report": report, "progress": glance.progress_of(config, run_id),
        "active": row.state in run_rows.ACTIVE, "losses": _thinned(report.losses if report is not None else []),
        "shifts": _shifts(report), "answers": answers(config, connection, row, report),
    }  # fmt: skip


def _report(config: Config, run_id: str) -> RunReport | None:
    try:
        return read_report(glance.run_directory(config, run_id))
    except (OSError, msgspec.DecodeError):  # a run directory may be cleared away while its page is open
        return None


def _thinned(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    stride = len(losses) // POINTS + 1
    return losses[::stride] + (losses[-1:] if len(losses) > 1 and (len(losses) - 1) % stride else [])


def _shifts(report: RunReport | None) -> dict[str, Shift]:
    """Hold-out -> its losses, in the order in which they were learned."""
    evaluation = report.evaluation if report is not None else None
    if evaluation is None:
        return {}
    old = {f"update {number}": shift for number, shift in sorted(evaluation.old.items(), key=lambda item: int(item[0]))}
    rows = {"new": evaluation.new, **old, "eval/": evaluation.eval}
    return {name: shift for name, shift in rows.items() if shift is not None}


def answers(
    config: Config, connection: Connection, row: Run, report: RunReport | None
) -> list[tuple[str, str | None, str]]:
    """(prompt, answer of the version before, answer of the candidate) of each canary."""
    before: dict[str, str] = {}
    if row.parent_version is not None:
        known = {version.number: version for version in run_rows.versions(connection, row.model)}
        parent = known.get(row.parent_version)
        found = _report(config, parent.run_id) if parent is not None else None
        before = {canary.prompt: canary.text for canary in found.canaries} if found is not None else {}
    canaries = report.canaries if report is not None else []
    return [(canary.prompt, before.get(canary.prompt), canary.text) for canary in canaries if canary.text]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the matrix of losses."""

    name: str
    """`base`, or `version 3`."""
    cells: list[float | None]
    """Mean loss on the hold-out of each update, in the order of the columns."""
    mean: float | None


class Matrix(msgspec.Struct, frozen=True, kw_only=True):
    """R[i, j] of Lopez-Paz & Ranzato (arXiv:1706.08840): loss of version i on the hold-out of update j, in nats."""

    updates: list[int]
    rows: list[Row]
    low: float
    high: float
    forgotten: float | None
    """Mean rise of the loss on each hold-out since its own update: BWT with the sign of a loss."""


def matrix(reports: list[tuple[Run, RunReport]]) -> Matrix:
    """The matrix of the versions' reports, oldest first."""
    losses = {f"version {run.version}": _measured(run, report, "after") for run, report in reports}
    base = {key: value for run, report in reports for key, value in _measured(run, report, "base").items()}
    updates = sorted(base)
    rows = [_row("base", base, updates)] if base else []
    rows += [_row(name, found, updates) for name, found in losses.items()]
    values = [cell for row in rows for cell in row.cells if cell is not None]
    return Matrix(
        updates=updates, rows=rows, low=min(values, default=0.0), high=max(values, default=0.0),
        forgotten=_forgotten(reports),
    )  # fmt: skip


def _measured(run: Run, report: RunReport, point: str) -> dict[int, float]:
    """Update -> mean loss on its hold-out."""
    evaluation = report.evaluation
    if evaluation is None:
        return {}
    found = {int(number): getattr(shift, point).mean for number, shift in evaluation.old.items()}
    if evaluation.new is not None:
        found[run.update_number] = getattr(evaluation.new, point).mean
    return found


def _row(name: str, found: dict[int, float], updates: list[int]) -> Row:
    cells = [found.get(update) for update in updates]
    known = [cell for cell in cells if cell is not None]
    return Row(name=name, cells=cells, mean=sum(known) / len(known) if known else None)


def _forgotten(reports: list[tuple[Run, RunReport]]) -> float | None:
    if len(reports) < 2:
        return None
    last = _measured(*reports[-1], "after")
    learned = {run.update_number: _measured(run, report, "after").get(run.update_number) for run, report in reports}
    rises = [last[update] - loss for update, loss in learned.items() if loss is not None and update in last]
    return sum(rises[:-1]) / len(rises[:-1]) if len(rises) > 1 else None


def model(config: Config, connection: Connection, live: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One model."""
    versions = run_rows.versions(connection, name)
    rows = [(run_rows.get(connection, version.run_id), version) for version in versions[:20]][::-1]
    reports = [(row, report) for row, _ in rows if (report := _report(config, row.id)) is not None]
    at, buffer = time.time(), config.models[name].buffer
    refused, paused = summary.quarantine_counts(connection), summary.paused(connection)
    return {
        "now": glance.model_now(config, connection, name, live, refused, paused, at), "at": at,
        "settings": config.models[name],
        "versions": versions, "tree": lineage(versions), "matrix": matrix(reports), "drift": _drift(reports),
        "knowledge": _knowledge(reports),
        "buffer": grouped(composition(connection, name, buffer)), "buffer_size": buffer.examples,
        "reception": by_version(connection, name), "runs": run_rows.recent(connection, name, 10),
        "search": search(config, name),
    }  # fmt: skip


def search(config: Config, name: str) -> dict[str, Any] | None:
    """The latest search for better settings with its pictures; None before the first."""
    if not (config.state_directory / "tuning" / name).is_dir():
        return None
    from daemon.tuning import outcome

    found = outcome.latest(config.state_directory, name)
    if found is None:
        return None
    is_open = bool(outcome.open_changes(config.models[name], found))
    return {"result": found, "pictures": outcome.pictures(found), "is_open": is_open}


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the buffer's table."""

    name: str
    learned: int
    held: int


def grouped(ages: list[Age]) -> list[Share]:
    """The latest updates one by one, all older ones as the first row."""
    older, latest = ages[:-UPDATES_SHOWN], ages[-UPDATES_SHOWN:]
    rows = [Share(name=str(age.update), learned=age.learned, held=age.held) for age in latest]
    if not older:
        return rows
    name = f"{older[0].update} to {older[-1].update}"
    return [Share(name=name, learned=sum(a.learned for a in older), held=sum(a.held for a in older)), *rows]


def _drift(reports: list[tuple[Run, RunReport]]) -> dict[str, list[tuple[float, float]]]:
    """KL from the base and from the version before, over the versions."""
    series: dict[str, list[tuple[float, float]]] = {}
    for run, report in reports:
        for name, measure in (
            ("base", report.evaluation and report.evaluation.drift_base),
            ("version before", report.evaluation and report.evaluation.drift_previous),
        ):
            if measure and run.version is not None:
                series.setdefault(name, []).append((run.version, measure.mean))
    return series


def _knowledge(reports: list[tuple[Run, RunReport]]) -> dict[str, list[tuple[float, float]]]:
    """ACC and BWT over the versions: scores are losses with a minus."""
    series: dict[str, list[tuple[float, float]]] = {}
    for run, report in reports:
        found = report.evaluation.sequence if report.evaluation is not None else None
        if found is None or run.version is None:
            continue
        for name, measure in (("ACC", found.acc), ("BWT", found.bwt)):
            if measure is not None:
                series.setdefault(name, []).append((run.version, measure.mean))
    return series


def lineage(versions: list[Version]) -> list[tuple[int, Version]]:
    """The versions as a tree: (depth, version), each below its parent; a straight line of children stays at its depth,
    so that only branches (a rollback, then another update) move to the right."""
    children: dict[int | None, list[Version]] = {}
    for version in sorted(versions, key=lambda each: each.number):
        children.setdefault(version.parent, []).append(version)
    known = {version.number for version in versions}
    roots = [version for version in versions if version.parent is None or version.parent not in known]
    found: list[tuple[int, Version]] = []
    pending = [(0, version) for version in sorted(roots, key=lambda each: -each.number)]
    while pending:
        depth, version = pending.pop()
        found.append((depth, version))
        branches = children.get(version.number, [])
        pending += [(depth + min(number, 1), child) for number, child in enumerate(reversed(branches))]
    return found
