"""What happened: `history`, `versions`, `log`."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import Failure

if TYPE_CHECKING:
    from daemon.config import Config
    from daemon.state.audit import Entry
    from daemon.state.runs import Version

Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many rows.")]


def history(
    model: options.ModelOrAll = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    limit: Limit = 20,
) -> None:
    """The runs, newest first.

    Why each started, what it learned from, what came of it.
    """
    from daemon.state import runs

    loaded = context.load(config)
    if model is not None:
        context.model_name(loaded, model)
    found = runs.recent(context.database(loaded), model, limit)
    if json:
        return screen.json(found)
    screen.table(
        ["RUN", "STATE", "VERSION", "TRIGGER", "STARTED", "TOOK", "NEW", "REASON"],
        [
            [
                run.id, run.state, "" if run.version is None else str(run.version), run.trigger,
                screen.clock(run.created_at), screen.duration(run.updated_at - run.created_at),
                str((run.cut or {}).get("rows", {}).get("new", "")), screen.safe(run.reason),
            ]
            for run in found
        ],
        "no run yet",
    )  # fmt: skip


def versions(
    model: options.ModelOrAll = None, config: options.ConfigOption = None, json: options.JsonOption = False
) -> None:
    """The published versions, with their parents."""
    from msgspec.structs import asdict

    from daemon.state import runs

    loaded = context.load(config)
    if model is not None:
        context.model_name(loaded, model)
    found = runs.versions(context.database(loaded), model)
    if json:
        return screen.json([{**asdict(version), "metrics": _metrics(loaded, version)} for version in found])
    screen.table(
        ["MODEL", "VERSION", "STATE", "PARENT", "RUN", "PUBLISHED", "ACTIVATED"],
        [
            [
                version.model, str(version.number), version.state, screen.version(version.parent), version.run_id,
                screen.clock(version.published_at), screen.clock(version.activated_at),
            ]
            for version in found
        ],
        "no version yet: the base models are served",
    )  # fmt: skip


def _metrics(config: "Config", version: "Version") -> dict[str, Any] | None:
    """What the version's trainer measured; None when its files are gone."""
    from daemon.publish import directory_of, read_manifest

    manifest = read_manifest(directory_of(config.state_directory / "versions", version.model, version.number))
    return None if manifest is None else manifest.evaluation


def log(
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    limit: Limit = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens until Ctrl-C.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only check the chain of hashes.")] = False,
) -> None:
    """The audit log.

    Every change of state and who asked for it; append-only, each row hashed with the one before.
    """
    from daemon.state import audit

    connection = context.database(context.load(config))
    if verify:
        if (broken := audit.broken_at(connection)) is not None:
            raise Failure(f"the audit log was changed at row {broken}: restore the database from a backup")
        return screen.say("the audit log is whole")
    found, after = audit.entries(connection, limit), 0
    while True:
        for entry in found:
            _print(entry, json)
            after = entry.id
        if not follow:
            return
        time.sleep(1)
        found = audit.entries(connection, 1000, after)


def _print(entry: "Entry", json: bool) -> None:
    import msgspec

    if json:
        return screen.say(msgspec.json.encode(entry).decode())
    detail = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in entry.detail.items()
    )
    screen.say(
        f"{screen.clock(entry.at)}  {entry.event:<18}  {screen.safe(entry.subject)}  {screen.safe(detail)}"
        + ("" if entry.actor == "eternad" else f"  by {entry.actor}")
    )
