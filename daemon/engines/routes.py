"""The aliases of engines that have none: a table that something in front of them (a gateway, the game) follows."""

import threading
from pathlib import Path

import msgspec

from daemon.engines.channel import Channel, checked
from daemon.engines.contract import ANYWHERE, EngineRefused, EngineUnavailable, Health, Routed
from strategies import request


class RouteTable:
    """{alias: name in the engine}, changed by compare-and-swap and, with a path, published as a JSON file.

    Without a file nothing is lost by a restart of the daemon: the first reconciliation proves and points again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._lock = path, threading.Lock()
        self._table: dict[str, str] = {}
        if path is not None and path.exists():
            self._table = msgspec.json.decode(path.read_bytes(), type=dict[str, str])

    def aliases(self) -> dict[str, str]:
        """A copy."""
        with self._lock:
            return dict(self._table)

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        """Point the alias elsewhere; `EngineUnavailable` when it does not point to `expected`."""
        with self._lock:
            previous = self._table.get(alias)
            if expected not in (ANYWHERE, previous):
                raise EngineUnavailable(f"{alias} points to {previous}, not to {expected}")
            table = {**self._table, alias: target}
            if self._path is not None:
                request.write(self._path, table)
            self._table = table
            return Routed(previous=previous)


class Tabled:
    """What engines without aliases share: theirs stand in the table, and one server answers `/health`."""

    def __init__(self, http: Channel, routes: RouteTable) -> None:
        self._http, self._routes = http, routes

    def aliases(self) -> dict[str, str]:
        """Of the table."""
        return self._routes.aliases()

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        """In the table."""
        return self._routes.route(alias, target, expected)

    def health(self) -> Health:
        """`GET /health`; what a restart has forgotten is missing in the listing."""
        try:
            checked(self._http.send("GET", "/health"))
        except (EngineUnavailable, EngineRefused) as error:
            return Health(ok=False, reason=str(error))
        return Health(ok=True)

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()
