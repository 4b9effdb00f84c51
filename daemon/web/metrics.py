"""`/metrics` for Prometheus, gathered at each scrape from the same overview that `status` shows.

Nothing is counted on the side: a number that the database has is read from there, so a restart never resets it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daemon import overview as glance
from daemon.config import Config
from daemon.overview import ModelNow, Overview
from daemon.state import runs, summary
from daemon.state.database import Connection
from strategies.request import Measure, RunReport, read_report

CONTENT_TYPE = CONTENT_TYPE_LATEST
Labelled = tuple[tuple[str, ...], float]


class Gauge(NamedTuple):
    """One metric: its name, what it means, its labels besides `model`, and where its values come from."""

    name: str
    meaning: str
    labels: tuple[str, ...]
    values: Callable[[ModelNow, "Facts"], Iterable[Labelled]]


class Facts(NamedTuple):
    """What is known of one model beside its overview."""

    now: float
    threshold: int
    duplicates: int
    failures: int
    runs: Mapping[str, int]
    versions: Mapping[str, int]
    swap: Mapping[str, float]
    """Seconds by phase of the activation of the live version."""
    report: RunReport | None
    verdict: Mapping[str, Any] | None
    quarantined: Mapping[str, int]


def one(value: float | bool | None) -> Iterator[Labelled]:
    """A metric without further labels, absent while there is no value."""
    if value is not None:
        yield (), float(value)


def each(values: Mapping[str, float]) -> Iterator[Labelled]:
    """One label value per key; `train/pending` gives two."""
    for key, value in values.items():
        yield tuple(key.split("/")), float(value)


def _age(at: float | None, facts: Facts) -> float | None:
    return None if at is None else max(0.0, facts.now - at)


def _progress(model: ModelNow, name: str) -> float | None:
    progress = model.run.progress if model.run is not None else None
    value = getattr(progress, name, None)
    return None if value is None else float(value)


def _losses(report: RunReport | None) -> Iterator[Labelled]:
    evaluation = report.evaluation if report is not None else None
    if evaluation is None:
        return
    shifts = {"new": evaluation.new, "eval": evaluation.eval, **{f"update_{n}": s for n, s in evaluation.old.items()}}
    for holdout, shift in shifts.items():
        for point in ("base", "before", "after") if shift is not None else ():
            yield (holdout, point), getattr(shift, point).mean


def _drift(report: RunReport | None, name: str) -> float | None:
    measure: Measure | None = getattr(report.evaluation, name, None) if report is not None else None
    return None if measure is None else measure.mean


def _checks(verdict: Mapping[str, Any] | None, field: str) -> Iterator[Labelled]:
    for check in (verdict or {}).get("checks", []):
        yield (check["name"],), float(check[field])


def _in_sync(model: ModelNow) -> bool | None:
    return None if model.engine_state == "unknown" else model.engine_serves == model.live_version


GAUGES: tuple[Gauge, ...] = (
    Gauge("pending_examples", "Examples that wait for an update", ("split",),
          lambda m, _: each({"train": m.waiting.train, "heldout": m.waiting.heldout})),
    Gauge("pending_oldest_age_seconds", "Age of the example that has waited longest (ingest to training lag)", (),
          lambda m, f: one(_age(m.waiting.oldest_at, f) or 0.0)),
    Gauge("pending_newest_age_seconds", "Time since the last example came in, while any waits", (),
          lambda m, f: one(_age(m.waiting.newest_at, f))),
    Gauge("threshold_examples", "Waiting examples that start an update", (), lambda _, f: one(f.threshold)),
    Gauge("examples", "Examples in the journal", ("split", "state"), lambda m, _: each(m.examples)),
    Gauge("duplicate_examples", "Copies of an example that was already known", (), lambda _, f: one(f.duplicates)),
    Gauge("quarantined", "Refused files and lines", ("code",), lambda _, f: each(f.quarantined)),
    Gauge("paused", "1 while updates are held back", (), lambda m, _: one(m.paused)),
    Gauge("runs", "Runs by state", ("state",), lambda _, f: each(f.runs)),
    Gauge("run_failures_in_a_row", "Failed or rejected runs since the last that was served", (),
          lambda _, f: one(f.failures)),
    Gauge("run_active", "1 while a run is at work", (), lambda m, _: one(m.run is not None)),
    Gauge("run_age_seconds", "Time since the active run was started", (),
          lambda m, f: one(_age(m.run.created_at, f) if m.run is not None else None)),
    Gauge("run_step", "Step of the active run", (), lambda m, _: one(_progress(m, "step"))),
    Gauge("run_steps", "Steps that the active run will take", (), lambda m, _: one(_progress(m, "steps"))),
    Gauge("run_loss", "Training loss of the active run, nats per token", (), lambda m, _: one(_progress(m, "loss"))),
    Gauge("run_tokens_per_second", "Speed of the active run", (),
          lambda m, _: one(_progress(m, "tokens_per_second"))),
    Gauge("run_eta_seconds", "Training time that is left of the active run", (),
          lambda m, _: one(_progress(m, "eta_seconds"))),
    Gauge("run_progress_age_seconds", "Time since the training child last said how far it is", (),
          lambda m, f: one(_age(_progress(m, "at"), f))),
    Gauge("last_run_end_timestamp_seconds", "When the latest run ended", (),
          lambda m, _: one(m.last.ended_at if m.last is not None else None)),
    Gauge("last_run_duration_seconds", "Wall time of the latest report, by phase", ("phase",),
          lambda _, f: each(f.report.seconds if f.report is not None else {})),
    Gauge("last_run_examples", "Examples of the latest report, by role", ("role",),
          lambda _, f: each(f.report.examples if f.report is not None else {})),
    Gauge("last_run_tokens", "Tokens trained on in the latest report", (),
          lambda _, f: one(f.report.tokens if f.report is not None else None)),
    Gauge("last_run_tokens_per_second", "Speed in the latest report", (),
          lambda _, f: one(f.report.tokens_per_second if f.report is not None else None)),
    Gauge("last_run_peak_memory_bytes", "Peak memory of the training child in the latest report", (),
          lambda _, f: one(f.report.peak_memory_bytes if f.report is not None else None)),
    Gauge("last_run_replay_ratio", "Share of replayed examples that was reached in the latest report", (),
          lambda _, f: one(f.report.replay_ratio if f.report is not None else None)),
    Gauge("gate_accepted", "1 if the latest verdict was accepted, else 0", (),
          lambda _, f: one(f.verdict["outcome"] == "accepted" if f.verdict else None)),
    Gauge("gate_check_value", "Each number of the latest verdict", ("check",),
          lambda _, f: _checks(f.verdict, "value")),
    Gauge("gate_check_limit", "The limit of each number", ("check",), lambda _, f: _checks(f.verdict, "limit")),
    Gauge("gate_check_passed", "1 if the number kept its limit", ("check",),
          lambda _, f: _checks(f.verdict, "passed")),
    Gauge("heldout_loss", "Loss in the latest report, nats per token", ("holdout", "point"),
          lambda _, f: _losses(f.report)),
    Gauge("drift_base", "KL(base || candidate) in the latest report, nats per token", (),
          lambda _, f: one(_drift(f.report, "drift_base"))),
    Gauge("drift_previous", "KL(version before || candidate) in the latest report, nats per token", (),
          lambda _, f: one(_drift(f.report, "drift_previous"))),
    Gauge("desired_version", "The version that should be served; 0 is the base", (),
          lambda m, _: one(m.live_version or 0)),
    Gauge("serving_version", "The version that the engine was last seen to serve; 0 is the base", (),
          lambda m, _: one(None if m.engine_state == "unknown" else m.engine_serves or 0)),
    Gauge("in_sync", "1 if the engine serves the desired version", (), lambda m, _: one(_in_sync(m))),
    Gauge("engine_up", "1 if the engine of the model is as it should be", (),
          lambda m, _: one(None if m.engine_state == "unknown" else m.engine_state == "ok")),
    Gauge("live_since_timestamp_seconds", "When the desired version was activated", (),
          lambda m, _: one(m.live_since)),
    Gauge("trial_version", "The version that is on trial with live requests, absent while there is none", (),
          lambda m, _: one(m.trial.version if m.trial else None)),
    Gauge("trial_percent", "Its share of the requests, of a shadow: of those that are compared", ("kind",),
          lambda m, _: each({m.trial.kind: m.trial.percent} if m.trial else {})),
    Gauge("trial_requests", "Requests of the present stage that it has answered or failed", (),
          lambda m, _: one(m.trial.requests if m.trial else None)),
    Gauge("trial_check_value", "Each number of its latest judgement", ("check",),
          lambda m, _: each({check.name: check.value for check in m.trial.checks} if m.trial else {})),
    Gauge("trial_check_limit", "The limit of each number", ("check",),
          lambda m, _: each({check.name: check.limit for check in m.trial.checks} if m.trial else {})),
    Gauge("versions", "Published versions by state", ("state",), lambda _, f: each(f.versions)),
    Gauge("swap_seconds", "How long the activation of the desired version took", ("phase",),
          lambda _, f: each(f.swap)),
)  # fmt: skip

HOUSE: tuple[tuple[str, str], ...] = (
    ("up", "1: the daemon answers"), ("start_timestamp_seconds", "When the daemon started"),
    ("models", "Models in the configuration"), ("all_paused", "1 while all updates are held back"),
    ("degraded", "1 while the library cannot be watched or the state cannot be written"),
    ("disk_free_bytes", "Free space where the state lies"), ("disk_low", "1 when that is too little for an update"),
    ("database_bytes", "Size of the database"), ("database_wal_bytes", "Size of its write-ahead log"),
    ("audit_rows", "Rows of the audit log"),
    ("notices_waiting", "Notices that have not reached their receiver"),
)  # fmt: skip

COUNTED: Mapping[str, str] = {
    "overflow": "Times that the kernel lost file events; a scan followed each",
    "scans": "Scans of the whole library",
    "files_found_by_rescan": "Files that a scan found and no event had told of",
    "reloads": "Configurations taken while running",
    "reload_failures": "Configurations refused while running",
    "turn_failures": "Turns of the loop that the disk or the database did not allow; each is tried again",
    "disk_full": "Of these, turns that found no room on the disk",
    "ballast_released": "Times that the reserved room was given up to a full disk",
}
"""Counters since the start, by their key in `counters` of the daemon's snapshot."""


def text(config: Config, connection: Connection, live: Mapping[str, Any]) -> bytes:
    """One scrape."""
    registry = CollectorRegistry()
    registry.register(_Scrape(config, connection, live))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Scrape(Collector):
    def __init__(self, config: Config, connection: Connection, live: Mapping[str, Any]) -> None:
        self._config, self._connection, self._live = config, connection, live

    def collect(self) -> Iterable[Metric]:
        """prometheus-client's protocol."""
        now = glance.collect(self._config, self._connection, self._live)
        yield from _house(self._config, self._connection, now)
        yield _files(self._connection)
        yield from _counters(self._live.get("counters", {}))
        facts = {model.name: _facts(self._config, self._connection, model, now.at) for model in now.models}
        for gauge in GAUGES:
            yield _family(gauge, now, facts)


def _house(config: Config, connection: Connection, now: Overview) -> Iterator[Metric]:
    path = config.state_directory / "eternad.db"
    values = {
        "up": 1, "start_timestamp_seconds": now.started_at or 0, "models": len(now.models), "all_paused": now.paused,
        "degraded": bool(now.degraded), "disk_free_bytes": now.disk_free_bytes, "disk_low": now.disk_low,
        "database_bytes": _size(path), "database_wal_bytes": _size(path.with_name("eternad.db-wal")),
        "audit_rows": summary.audit_rows(connection),
        "notices_waiting": len(list((config.state_directory / "outbox").glob("[!.]*.json"))),
    }  # fmt: skip
    for name, meaning in HOUSE:
        yield GaugeMetricFamily(f"eternad_{name}", meaning, value=float(values[name]))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _files(connection: Connection) -> Metric:
    family = GaugeMetricFamily("eternad_files", "Dropped files that are known, by state", labels=["state"])
    for state, number in summary.file_counts(connection).items():
        family.add_metric([state], number)
    return family


def _counters(counters: Mapping[str, float]) -> Iterator[Metric]:
    """What the running daemon counts by itself, as far as it does."""
    for name, meaning in COUNTED.items():
        if name in counters:
            yield CounterMetricFamily(f"eternad_{name}", meaning, value=counters[name])


def _facts(config: Config, connection: Connection, model: ModelNow, now: float) -> Facts:
    name, latest = model.name, runs.recent(connection, model.name, 1)
    judged = next((run for run in runs.recent(connection, name) if run.verdict is not None), None)
    live = runs.live_version(connection, name)
    activation = live.activation if live is not None else None
    counted = summary.run_counts(connection)
    states = [version.state for version in runs.versions(connection, name)]
    return Facts(
        now=now,
        threshold=config.models[name].schedule.threshold_examples,
        duplicates=summary.duplicates(connection, name),
        failures=runs.failures_in_a_row(connection, name)[0],
        runs={state: number for (owner, state), number in counted.items() if owner == name},
        versions={state: states.count(state) for state in set(states)},
        swap={key[:-3]: value / 1e3 for key, value in (activation or {}).items() if key.endswith("_ms")},
        report=next((report for run in (judged, *latest) if run and (report := _report(config, run.id))), None),
        verdict=judged.verdict if judged is not None else None,
        quarantined={code: number for (owner, code), number in summary.quarantine_counts(connection).items()
                     if owner == name},
    )  # fmt: skip


def _report(config: Config, run_id: str) -> RunReport | None:
    try:
        return read_report(glance.run_directory(config, run_id))
    except OSError:
        return None


def _family(gauge: Gauge, now: Overview, facts: Mapping[str, Facts]) -> Metric:
    family = GaugeMetricFamily(f"eternad_{gauge.name}", gauge.meaning, labels=["model", *gauge.labels])
    for model in now.models:
        for labels, value in gauge.values(model, facts[model.name]):
            family.add_metric([model.name, *labels], value)
    return family
