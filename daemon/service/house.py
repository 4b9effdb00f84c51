"""What the parts of the service share: the configuration, the database and where things lie on disk."""

import logging
import secrets
import shutil
import socket
from pathlib import Path

from daemon.config import Config, Model
from daemon.state.database import Connection, open_database, set_setting, setting, transaction
from daemon.state.integrity import check_quickly

log = logging.getLogger("eternad")

CHECK_SECONDS = 0.5
"""Spent at the start on finding out whether the database is whole."""


class House:
    """One daemon's state directory, open. Everything below it is built here and nowhere else."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.database: Connection = open_database(database_path(config))
        check_quickly(self.database, CHECK_SECONDS)
        for directory in (self.runs, self.versions, self.cache):
            directory.mkdir(parents=True, exist_ok=True)

    @property
    def runs(self) -> Path:
        """`STATE/runs/RUN_ID/`."""
        return self.config.state_directory / "runs"

    @property
    def versions(self) -> Path:
        """`STATE/versions/MODEL/NNNN/`: the adapter root that engines may read."""
        return self.config.state_directory / "versions"

    @property
    def cache(self) -> Path:
        """What can be made anew: general text that a base model generated, cached evaluations."""
        return self.config.state_directory / "cache"

    def model(self, name: str) -> Model:
        """The configuration of a model; raises `KeyError` for one that was removed."""
        return self.config.models[name]

    def owner(self) -> str:
        """The name under which this daemon keeps aliases of the gateway: made once, so that a backup keeps it."""
        name = setting(self.database, "owner")
        if not name:
            name = f"{self.config.state_directory} on {socket.gethostname()} ({secrets.token_hex(4)})"
            with transaction(self.database) as connection:
                set_setting(connection, "owner", name)
        return name

    def disk_is_low(self) -> bool:
        """Less free space than `disk_free_bytes_min` where the state lies."""
        return shutil.disk_usage(self.config.state_directory).free < self.config.disk_free_bytes_min

    def close(self) -> None:
        """Close the database: its WAL is folded in."""
        self.database.close()


def database_path(config: Config) -> Path:
    """`STATE/eternad.db`."""
    return config.state_directory / "eternad.db"
