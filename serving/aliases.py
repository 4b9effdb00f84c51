"""The alias file: what makes a server that was killed come back serving the same versions."""

import os
from pathlib import Path

import msgspec


class Pointer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where an alias points; `path` and `generation` of the adapter, or none for the base."""

    target: str
    path: str | None = None
    generation: str | None = None


class _Table(msgspec.Struct, frozen=True):
    format: str
    aliases: dict[str, Pointer]


class AliasFile:
    """Replaced atomically at every change, and durable before the change is answered."""

    FORMAT = "eternad.aliases/1"

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Pointer]:
        """The table, empty when there is no file yet; raises `msgspec.DecodeError` for a damaged one."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Table).aliases
        except FileNotFoundError:
            return {}

    def write(self, aliases: dict[str, Pointer]) -> None:
        """Temporary name, fsync, rename, fsync of the directory."""
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(_Table(format=self.FORMAT, aliases=aliases)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
