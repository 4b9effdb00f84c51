"""What commands work on: the configuration, the database (also while no daemon runs) and the running daemon."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.cli.failure import NOT_RUNNING, USAGE, Failure

if TYPE_CHECKING:
    from daemon.config import Config
    from daemon.control import Order, Reply
    from daemon.state.database import Connection

PLACES = (Path("eternad.toml"), Path("/etc/eternad/eternad.toml"))


chosen: dict[str, Path] = {}
"""`--config` given before the command's name; set anew by each `main`."""


def config_path(given: Path | None = None) -> Path:
    """The file to read: `--config`, `$ETERNAD_CONFIG`, or the first of `PLACES` that exists."""
    given = given or chosen.get("config")
    if given is None and os.environ.get("ETERNAD_CONFIG"):
        given = Path(os.environ["ETERNAD_CONFIG"])
    return given or next((place for place in PLACES if place.exists()), PLACES[0])


def load(given: Path | None = None) -> "Config":
    """The configuration; raises `ConfigError`."""
    from daemon.config import load as load_config

    return load_config(config_path(given))


def model_name(config: "Config", name: str) -> str:
    """`name` if the configuration has it; else a failure that names the nearest."""
    if name in config.models:
        return name
    import difflib

    nearest = difflib.get_close_matches(name, list(config.models), 1, 0.4)
    hint = f"did you mean `{nearest[0]}`?" if nearest else "there are: " + ", ".join(config.models)
    raise Failure(f"no model `{name}` in the configuration; {hint}", USAGE)


def database(config: "Config") -> "Connection":
    """The state, read-only; an empty one before the daemon's first start."""
    from daemon.state import database as state

    try:
        return state.open_read_only(config.state_directory / "eternad.db")
    except FileNotFoundError:
        import sqlite3

        empty = sqlite3.connect(":memory:", isolation_level=None)
        state.migrate(empty, Path(":memory:"))
        return empty
    except state.DatabaseError as error:
        raise Failure(f"{config.state_directory / 'eternad.db'}: {error}") from None


def live(config: "Config") -> dict[str, Any] | None:
    """The running daemon's snapshot, None when nothing answers."""
    from daemon.control import Client, NotRunning

    try:
        return Client(config.state_directory / "control.sock").status()
    except NotRunning:
        return None


def send(config: "Config", order: "Order") -> "Reply":
    """Hand an order to the daemon; a refusal is a failure."""
    from daemon.control import Client, NotRunning

    try:
        reply = Client(config.state_directory / "control.sock").send(order)
    except NotRunning as error:
        raise Failure(f"the daemon is not running: {error}", NOT_RUNNING) from None
    if not reply.ok:
        raise Failure(reply.text)
    return reply


def printable(row: Any) -> dict[str, Any]:
    """A row for `--json`, its JSON body as JSON and not as bytes."""
    import msgspec

    return {**msgspec.structs.asdict(row), "body": msgspec.Raw(row.body)}
