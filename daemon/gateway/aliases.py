"""The table in memory: what every request is looked up in, and the only way to change it."""

import asyncio
import time

import msgspec

from daemon.gateway.table import Route, Table, TableFile


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """An alias after a change."""

    alias: str
    route: Route | None
    previous: Route | None
    flip_ms: float
    """From one table to the other, for requests."""
    persist_ms: float
    """Until the change could not be lost any more."""


class Aliases:
    """Requests read `find` without waiting; writers come one after the other."""

    def __init__(self, file: TableFile) -> None:
        """Reads the file; raises `msgspec.DecodeError` or `OSError`."""
        self._file, self._lock = file, asyncio.Lock()
        self._flip(file.read())

    def find(self, name: str) -> tuple[str, Route] | None:
        """The alias and its route; a version that stands in the table is found by its own name, too."""
        return self._names.get(name)

    def is_named(self, version: str) -> bool:
        """Whether any alias still sends requests to it."""
        return any(version == target.version for route in self.table.aliases.values() for target in route.all_targets())

    def versions(self) -> set[str]:
        """Every version of the table."""
        return {target.version for route in self.table.aliases.values() for target in route.all_targets()}

    async def change(self, alias: str, route: Route | None, expected: int | None, owner: str | None = None) -> Changed:
        """Compare, make durable, then switch. Raises `Conflict`, or `OSError` when it cannot be stored.

        Goes on to its end also when the writer does not wait for it.
        """
        return await asyncio.shield(self._change(alias, route, expected, owner))

    async def _change(self, alias: str, route: Route | None, expected: int | None, owner: str | None) -> Changed:
        async with self._lock:
            previous = self.table.aliases.get(alias)
            table = self.table.changed(alias, route, expected, owner)
            started = time.perf_counter()
            await asyncio.to_thread(self._file.write, table)  # an fsync must not hold up requests
            durable = time.perf_counter()
            self._flip(table)
            return Changed(
                alias=alias, route=table.aliases.get(alias), previous=previous,
                flip_ms=(time.perf_counter() - durable) * 1e3, persist_ms=(durable - started) * 1e3,
            )  # fmt: skip

    async def reread(self) -> None:
        """Take what somebody has written into the file by hand; raises like the constructor, changing nothing."""
        async with self._lock:
            self._flip(await asyncio.to_thread(self._file.read))

    def _flip(self, table: Table) -> None:
        names: dict[str, tuple[str, Route]] = {}
        for alias, route in table.aliases.items():
            for target in route.targets:
                names.setdefault(target.version, (alias, Route(targets=[target], generation=route.generation)))
        names.update({alias: (alias, route) for alias, route in table.aliases.items()})
        self.table, self._names = table, names
