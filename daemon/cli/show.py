"""`eternad show`: one run, version or file, with the numbers and reasons that a person asks for."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import Failure

if TYPE_CHECKING:
    from daemon.config import Config
    from daemon.state.database import Connection
    from daemon.state.runs import Run, Version
    from strategies.request import Measure, RunReport, Shift


def show(
    what: Annotated[str, typer.Argument(metavar="RUN|VERSION|FILE", help="npc-00004, npc@3, content/npc/a.txt")],
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:
    """A run, a version or a file in detail.

    What a run learned from, losses before and after, the verdict; where a version lies; what became of a file.
    """
    loaded = context.load(config)
    connection = context.database(loaded)
    if (version := _version(connection, what)) is not None:
        return _show_version(loaded, connection, version, json)
    if (run := _run(connection, what)) is not None:
        return _show_run(loaded, run, json)
    if not _show_file(loaded, connection, what, json):
        raise Failure(f"`{what}` is no run, version or known file; see: eternad history, eternad versions")


def _version(connection: "Connection", what: str) -> "Version | None":
    from daemon.state import runs

    found = re.fullmatch(r"([^@/]+)@(\d+)", what)
    if found is None:
        return None
    every = runs.versions(connection, found[1])
    return next((version for version in every if version.number == int(found[2])), None)


def _run(connection: "Connection", what: str) -> "Run | None":
    from daemon.state import runs

    try:
        return runs.get(connection, what)
    except KeyError:
        return None


def _show_run(config: "Config", run: "Run", json: bool) -> None:
    from daemon.overview import progress_of, run_directory
    from strategies.request import read_report

    report = read_report(run_directory(config, run.id))
    if json:
        return screen.json({"run": run, "report": report, "progress": progress_of(config, run.id)})
    state = screen.style(run.state, "green" if run.state in ("LIVE", "SUPERSEDED") else "yellow")
    screen.say(f"run {screen.style(run.id, 'bold')} of {run.model}: {state}" + _colon(run.reason))
    screen.say(
        f"update {run.update_number}, started by {run.trigger} {screen.clock(run.created_at)}, "
        f"from version {screen.version(run.parent_version)}"
        + ("" if run.version is None else f", became version {run.version}")
    )
    if run.cut:
        screen.say("learned from: " + _counts(run.cut.get("rows", {})))
    _verdict(run.verdict)
    if report is not None:
        _report(report)


def _colon(reason: str) -> str:
    return f": {screen.safe(reason)}" if reason else ""


def _counts(rows: dict[str, int]) -> str:
    return ", ".join(f"{number} {role}" for role, number in rows.items())


def _verdict(verdict: dict[str, Any] | None) -> None:
    if verdict is None:
        return
    good = verdict["outcome"] == "accepted"
    screen.say(f"\nverdict: {screen.style(verdict['outcome'], 'green' if good else 'red', 'bold')}")
    for check in verdict["checks"]:
        mark = screen.style("passed", "green") if check["passed"] else screen.style("failed", "red")
        screen.say(f"  {mark}  {check['name']}: {check['message']}")


def _report(report: "RunReport") -> None:
    if report.status == "failed":
        screen.say(f"\nthe trainer failed ({report.code}): {screen.safe(report.reason)}")
    rows = list(_shifts(report))
    if rows:
        screen.say("\nlosses, nats per token (95 % interval of the change)")
        screen.table(["HOLD-OUT", "EXAMPLES", "BASE", "BEFORE", "AFTER", "CHANGE"], rows, "")
    evaluation = report.evaluation
    for name, drift in (("base", evaluation and evaluation.drift_base),
                        ("previous version", evaluation and evaluation.drift_previous)):  # fmt: skip
        if drift:
            screen.say(f"drift, KL({name} || candidate): {_interval(drift)}")
    _preferences(report)
    _sequence(report)
    _effort(report)


def _preferences(report: "RunReport") -> None:
    """Held-out comparisons and ratings: their losses, and how many comparisons are ranked right."""
    evaluation = report.evaluation
    known = evaluation.preference_losses if evaluation is not None else {}
    if evaluation is None or not known:
        return
    rows = [_shift(f"update {name}" if name.isdecimal() else name, shift) for name, shift in known.items()]
    screen.say("\npreference losses, DPO and KTO against the base (95 % interval of the change)")
    screen.table(["HOLD-OUT", "EXAMPLES", "BASE", "BEFORE", "AFTER", "CHANGE"], rows, "")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in evaluation.preference.items())
    if shares:
        screen.say(f"comparisons ranked right: {shares}")


def _sequence(report: "RunReport") -> None:
    """What the updates so far have done to each other."""
    evaluation = report.evaluation
    if evaluation is None or evaluation.sequence is None:
        return
    found = evaluation.sequence
    named = {"ACC": found.acc, "BWT": found.bwt, "FWT": found.fwt, "forgetting": found.forgetting}
    said = ", ".join(f"{name} {_interval(measure, '+')}" for name, measure in named.items() if measure is not None)
    if said:
        screen.say(f"over all updates, scores are -loss: {said}; noise floor {evaluation.noise:.3f}")


def _shifts(report: "RunReport") -> "list[list[str]]":
    evaluation = report.evaluation
    if evaluation is None:
        return []
    old = {f"update {number}": shift for number, shift in evaluation.old.items()}
    named = {"new": evaluation.new, **old, "eval/": evaluation.eval, "general text": evaluation.general}
    return [_shift(name, shift) for name, shift in named.items() if shift is not None]


def _shift(name: str, shift: "Shift") -> list[str]:
    numbers = [f"{measure.mean:.3f}" for measure in (shift.base, shift.before, shift.after)]
    return [name, str(shift.after.examples), *numbers, _interval(shift.change, "+")]


def _interval(measure: "Measure", sign: str = "") -> str:
    return f"{measure.mean:{sign}.3f} [{measure.low:{sign}.3f}, {measure.high:{sign}.3f}]"


def _effort(report: "RunReport") -> None:
    screen.say(
        f"\n{report.steps} steps, {report.epochs:.1f} epochs, {report.tokens} tokens,"
        f" {report.tokens_per_second:.0f} tokens/s, peak memory {screen.size(report.peak_memory_bytes)}"
        + (f", stopped early: {report.stopped_early}" if report.stopped_early else "")
    )
    if report.seconds:
        screen.say("seconds: " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items()))
    for name, counted in report.strategies.items():
        screen.say(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in counted.items()))


def _show_version(config: "Config", connection: "Connection", version: "Version", json: bool) -> None:
    from daemon.publish import directory_of, read_manifest

    directory = directory_of(config.state_directory / "versions", version.model, version.number)
    manifest = read_manifest(directory)
    if json:
        return screen.json({"version": version, "directory": str(directory), "manifest": manifest})
    screen.say(f"version {screen.style(str(version.number), 'bold')} of {version.model}: {version.state}")
    screen.say(f"parent {screen.version(version.parent)}, run {version.run_id}")
    screen.say(f"published {screen.clock(version.published_at)}, activated {screen.clock(version.activated_at) or '-'}")
    if manifest is None:
        screen.say(f"its files are gone from {directory}")
    else:
        total = screen.size(sum(entry.size for entry in manifest.files.values()))
        screen.say(f"{directory}: {len(manifest.files)} files, {total}, base {manifest.base_sha256[:12]}")
    if (run := _run(connection, version.run_id)) is not None:
        screen.say()
        _show_run(config, run, json=False)


def _show_file(config: "Config", connection: "Connection", what: str, json: bool) -> bool:
    from daemon.state import files, quarantine, summary

    library, path = config.library_directory, what
    if Path(what).is_absolute() or (Path(what).exists() and not (library / what).exists()):
        absolute = Path(what).absolute()
        path = str(absolute.relative_to(library)) if absolute.is_relative_to(library) else what
    known = files.get(connection, path)
    examples = summary.examples_of_file(connection, path)
    refused = [row for row in quarantine.rows(connection) if row.path == path]
    if known is None and not examples and not refused:
        return False
    if json:
        screen.json({"path": path, "file": known, "examples": examples, "quarantine": refused})
        return True
    screen.say(f"{screen.safe(path)}: {'known' if known is None else known.state}")
    screen.table(
        ["MODEL", "SPLIT", "STATE", "RUN", "EXAMPLES"],
        [[str("" if value is None else value) for value in row.values()] for row in examples],
        "no example came of it",
    )
    for row in refused:
        place = "" if row.line is None else f" line {row.line}"
        screen.say(f"quarantined{place} ({row.code}): {screen.safe(row.message)}")
    return True
