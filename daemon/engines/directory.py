"""Publishes versions as directories, for whatever watches them: NIM, vLLM's file system resolver, a game's installer.

`ROOT/NAME/` appears whole or not at all, and `ROOT/aliases.json` says which one an alias means. Nothing answers
here, so nothing is proven: an accepted version goes live unprobed.
"""

import shutil
from pathlib import Path

from daemon.engines.contract import Capabilities, EngineRefused, Fingerprint, Handle, Health, Loaded, Routed, Version
from daemon.engines.routes import RouteTable
from strategies.request import Canary

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Directory:
    """One directory that others read."""

    def __init__(self, root: Path, slots: int = 3) -> None:
        self._root, self._slots = root, slots
        self._routes = RouteTable(root / "aliases.json")

    def capabilities(self) -> Capabilities:
        """It can only be read."""
        return Capabilities(base="base", slots=self._slots, moves_aliases=False, can_probe=False)

    def load(self, version: Version) -> Handle:
        """Copy under a temporary name, rename."""
        target, partial = self._root / version.name, self._root / f".{version.name}.tmp"
        if not target.exists():
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir(parents=True)
                for name in (*FILES, *(["manifest.json"] if (version.path / "manifest.json").exists() else [])):
                    shutil.copyfile(version.path / name, partial / name)
                partial.rename(target)
            except OSError as error:
                raise EngineRefused(f"{version.name} cannot be published to {target}: {error}") from error
        return Handle(name=version.name)

    def loaded(self) -> list[Loaded]:
        """What is published, oldest first."""
        found = [path for path in self._root.glob("*@*") if path.is_dir() and not path.name.startswith(".")]
        rows = [Loaded(name=path.name, root=str(path), loaded_at=path.stat().st_ctime) for path in found]
        return sorted(rows, key=lambda row: row.loaded_at)

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:  # noqa: ARG002 - the contract's signature
        """Nothing answers."""
        raise EngineRefused(f"{self._root} is a directory: it cannot be asked")

    def aliases(self) -> dict[str, str]:
        """As in `aliases.json`."""
        return self._routes.aliases()

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        """Replace `aliases.json`."""
        return self._routes.route(alias, target, expected)

    def unload(self, name: str) -> None:
        """Remove the directory, under another name first, so that nobody finds half of it."""
        gone = self._root / f".{name}.tmp"
        shutil.rmtree(gone, ignore_errors=True)
        if (self._root / name).exists():
            (self._root / name).rename(gone)
            shutil.rmtree(gone)

    def health(self) -> Health:
        """Whether the directory is there."""
        return Health(ok=self._root.is_dir(), reason="" if self._root.is_dir() else f"{self._root} is not there")

    def close(self) -> None:
        """Nothing is open."""
