"""The one table of aliases: which versions answer to a name, with which weights, at which engines.

It is one JSON file. A change writes the whole of it anew (temporary name, fsync, rename, fsync of the directory), is
durable before it is answered, and is refused when another writer was faster: whoever changes an alias says which
generation of it he has seen. Generations never come again, not even after an alias was removed. An alias that a daemon
keeps belongs to it: two daemons that both mean the same alias would otherwise move it to and fro for ever.
"""

import os
from pathlib import Path
from typing import Any

import msgspec

from daemon import failpoint

FORMAT = "eternad.gateway/1"
FileError = (OSError, msgspec.DecodeError)


class InvalidRoute(Exception):
    """A route that cannot be served; the message says why."""


class Conflict(Exception):
    """The alias is at another generation than the writer thinks."""


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One version and where it answers."""

    version: str
    """What answers say: `npc@0007`."""
    urls: list[str]
    """One per replica: `http://127.0.0.1:8000` or `unix:/run/engine.sock`."""
    model: str = ""
    """The engine's own name for it (SGLang: `base:npc@0007`, LoRAX: a path); empty: the version's."""
    weight: float = 1.0
    """Share of the requests, relative to the other targets' weights. Of a shadow: the share that is copied, 0 to 1."""
    extra: dict[str, Any] = {}
    """Fields that the engine wants in every request (LoRAX: `adapter_source`)."""

    @property
    def name(self) -> str:
        """The value of `model` that the engine understands."""
        return self.model or self.version


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an alias stands for."""

    targets: list[Target]
    """The stable version first, then canaries."""
    shadow: Target | None = None
    """Gets copies of requests; its answers are counted and thrown away."""
    generation: int = 0
    """The table's generation at which this route was made."""
    owner: str = ""
    """The daemon that keeps it; empty: nobody in particular."""

    def all_targets(self) -> list[Target]:
        """The shadow included."""
        return self.targets + ([self.shadow] if self.shadow else [])


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The file's contents."""

    format: str = FORMAT
    generation: int = 0
    """Grows by one with every change."""
    aliases: dict[str, Route] = {}

    def changed(self, alias: str, route: Route | None, expected: int | None, owner: str | None = None) -> "Table":
        """The next table, with `route` (None: without the alias).

        `expected`: the generation at which the writer has seen the alias, 0 for "it is not there", None for "I do not
        care". `owner`: the daemon that writes; None: a person, who leaves it to whom it belongs. Raises `Conflict`.
        """
        found = self.aliases.get(alias, Route(targets=[]))
        if expected is not None and expected != found.generation:
            raise Conflict(f"{alias} is at generation {found.generation}, not {expected}: read it again, then decide")
        if owner and found.owner and owner != found.owner:
            raise Conflict(
                f"{alias} is kept by another daemon, {found.owner}: stop that one, then DELETE /aliases/{alias}/owner"
            )
        aliases = {name: each for name, each in self.aliases.items() if name != alias}
        following = self.generation + 1
        if route is not None:
            kept = found.owner if owner is None else owner
            aliases[alias] = msgspec.structs.replace(route, generation=following, owner=kept)
        return Table(generation=following, aliases=aliases)


def check(route: Route) -> Route:
    """The route, if requests can be served by it; else `InvalidRoute`."""
    if not route.targets:
        raise InvalidRoute("no targets: an alias needs at least one version")
    names = [target.version for target in route.all_targets()]
    if len(set(names)) != len(names):
        raise InvalidRoute(f"a version stands there twice: {', '.join(names)}")
    if any(not 0 <= target.weight < float("inf") for target in route.targets) or not _weight(route):
        raise InvalidRoute("weights must be >= 0, and one of them > 0")
    if route.shadow and not 0 <= route.shadow.weight <= 1:
        raise InvalidRoute("a shadow's weight is the share of requests that is copied: 0 to 1")
    for target in route.all_targets():
        _check_target(target)
    return route


def _weight(route: Route) -> float:
    return sum(target.weight for target in route.targets)


def _check_target(target: Target) -> None:
    if not target.version or not target.version.isprintable() or not target.version.isascii():
        raise InvalidRoute(f"{target.version!r} cannot stand in a header: a version is printable ASCII")
    if not target.urls:
        raise InvalidRoute(f"{target.version} has no urls: where does it answer?")
    for url in target.urls:
        if not url.startswith(("http://", "unix:/")):
            raise InvalidRoute(f"{target.version}: {url} is neither http://HOST:PORT nor unix:/PATH")


class TableFile:
    """The file. One process writes it: the gateway."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Table:
        """Empty when there is no file yet; raises `msgspec.DecodeError` for one that is not ours."""
        try:
            table = msgspec.json.decode(self.path.read_bytes(), type=Table)
        except FileNotFoundError:
            return Table()
        if table.format != FORMAT:
            raise msgspec.DecodeError(f"{self.path} has format {table.format}, not {FORMAT}")
        return table

    def write(self, table: Table) -> None:
        """All of it or the old one, whenever the process dies; durable when this returns. Raises `OSError`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        failpoint.reach("TABLE:before")
        with temporary.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(table), indent=1))
            failpoint.reach("TABLE:written")
            file.flush()
            os.fsync(file.fileno())
        failpoint.reach("TABLE:synced")
        temporary.replace(self.path)
        failpoint.reach("TABLE:renamed")
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        failpoint.reach("TABLE:after")
