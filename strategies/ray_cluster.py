"""The way to a Ray cluster: found, joined (with a token where there is one), left again; a missing one is one sentence.

Ray is an extra (`eternad[ray]`), imported by the children that need it and never by the daemon.
"""

import importlib.util
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

INSTALL = "pip install 'eternad[ray]'"
DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_TRAIN_V2_ENABLED": "1",
    # they ask the dashboard, which a small cluster need not have
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_LOG_TO_STDERR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # whoever searches has a handler of its own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables
}
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
NO_TOKEN = (
    "this Ray cluster asks for no token: whoever reaches its port can run programs on it; `ray get-auth-token"
    " --generate` and RAY_AUTH_MODE=token for all of it close that"
)
KNOCK_SECONDS = 10.0
LOOK_SECONDS = 5.0
"""Looking is a call to the head: not at every turn of a loop."""
PATIENCE_SECONDS = 120.0
"""So long may a cluster lack what a run needs (a node restarts) before the run is given up."""


class NoCluster(Exception):
    """There is no Ray, or no cluster to be reached; the message says what to do."""


def require() -> None:
    """Raises `NoCluster` with the command that installs Ray."""
    if importlib.util.find_spec("ray") is None:
        raise NoCluster(f"`ray` is not installed here: {INSTALL}")


@contextmanager
def joined(shows_workers: bool = False) -> Iterator[None]:
    """Connected to the cluster of `RAY_ADDRESS`, or to the one that runs on this machine. Raises `NoCluster`.

    shows_workers: what they print is printed here.
    """
    require()
    knock(os.environ.get("RAY_ADDRESS", ""))
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    elif os.environ.get("RAY_AUTH_MODE", "disabled") == "disabled":
        print(NO_TOKEN, file=sys.stderr)
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what matters becomes an exception
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address="auto", log_to_driver=shows_workers, logging_level="error", configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        said = str(error).splitlines()[0]
        raise NoCluster(f"no Ray cluster was reached ({said}): `ray start --head`, or set RAY_ADDRESS") from None
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray has put one in their place that aborts with a stack trace
    try:
        yield
    finally:
        ray.shutdown()


def has_token() -> bool:
    """Whether there is a token to show, where Ray looks for one."""
    return any(os.environ.get(name) for name in TOKENS) or (Path.home() / ".ray" / "auth_token").exists()


def knock(address: str) -> None:
    """Whether anybody is at `HOST:PORT`: Ray itself looks for a head that is not there for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise NoCluster(f"nobody answers at RAY_ADDRESS = {address} ({error}): `ray start --head` there") from None


class Room:
    """Whether the cluster, all of it, is large enough; it may fall short for `PATIENCE_SECONDS`."""

    def __init__(self, needed: Mapping[str, float], patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.needed, self.patience_seconds = needed, patience_seconds
        self._enough_at, self._looked_at = time.monotonic(), -math.inf

    def shortage(self) -> str:
        """What has been missing for too long; empty while there is nothing to complain of."""
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            return ""
        import ray

        self._looked_at = time.monotonic()
        there = ray.cluster_resources()
        short = {name: amount for name, amount in self.needed.items() if there.get(name, 0.0) < amount}
        if not short:
            self._enough_at = time.monotonic()
        if time.monotonic() - self._enough_at < self.patience_seconds:
            return ""
        wanted = ", ".join(f"{amount:g} {name} (there are {there.get(name, 0.0):g})" for name, amount in short.items())
        return f"for {self.patience_seconds:g} s the cluster has lacked {wanted}: start nodes with `ray start`"
