"""Runs as TensorBoard event files: one directory per run for its losses, one per model for its path over the updates.

Written from the reports and the database by a command, never by the daemon, which so carries neither the library nor a
second truth. A run that is there already is left alone, so that the command can be repeated (a timer, a cron job).
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
from tensorboardX.writer import SummaryWriter

from daemon import overview
from daemon.config import Config
from daemon.state import runs
from daemon.state.database import Connection
from daemon.state.runs import ACTIVE, Run
from strategies.request import RunReport, read_report


def write_runs(config: Config, connection: Connection, directory: Path, model: str | None = None) -> list[str]:
    """Write the ended runs that `directory` lacks, oldest first; returns their ids."""
    written = []
    for run in reversed(runs.recent(connection, model, limit=-1)):
        report = None if run.state in ACTIVE or (directory / run.id).exists() else _report(config, run.id)
        if report is not None:
            _write_run(directory, run, report)
            written.append(run.id)
    return written


def _report(config: Config, run_id: str) -> RunReport | None:
    try:
        return read_report(overview.run_directory(config, run_id))
    except (OSError, msgspec.DecodeError):  # cleared away, or torn by a crash of the disk
        return None


def _write_run(directory: Path, run: Run, report: RunReport) -> None:
    """Into a hidden directory that is renamed when it is whole: a run is exported or it is not."""
    hidden = directory / f".{run.id}"
    with SummaryWriter(logdir=str(hidden)) as writer:
        for step, loss in report.losses:
            writer.add_scalar("train/loss", loss, step, walltime=run.updated_at)
        writer.add_text("run", _words(run, report), report.steps, walltime=run.updated_at)
    with SummaryWriter(logdir=str(directory / run.model), filename_suffix=f".{run.id}") as writer:
        for tag, value in _numbers(report):
            writer.add_scalar(tag, value, run.update_number, walltime=run.updated_at)
    hidden.rename(directory / run.id)


def _numbers(report: RunReport) -> Iterator[tuple[str, float]]:
    """What an update has done: hold-outs by the update that they belong to, drift, cost. Losses: nats per token."""
    if (found := report.evaluation) is not None:
        shifts = {"new": found.new, "eval": found.eval, **{f"update_{n}": shift for n, shift in found.old.items()}}
        for name, shift in shifts.items():
            if shift is not None:
                yield f"loss_before/{name}", shift.before.mean
                yield f"loss_after/{name}", shift.after.mean
        for name, measure in (("base", found.drift_base), ("version_before", found.drift_previous)):
            if measure is not None:
                yield f"drift/{name}", measure.mean
    yield from ((f"examples/{role}", float(number)) for role, number in report.examples.items())
    yield from ((f"seconds/{phase}", seconds) for phase, seconds in report.seconds.items())
    yield "cost/tokens_per_second", report.tokens_per_second
    yield "cost/peak_memory_bytes", float(report.peak_memory_bytes)


def _words(run: Run, report: RunReport) -> str:
    """Markdown: how it ended, and what the candidate answers."""
    answers = [f"- {canary.prompt}: {canary.text}" for canary in report.canaries if canary.text]
    return "\n".join([f"**{run.state}** {run.reason or report.reason}", "", *answers])
