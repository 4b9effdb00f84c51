"""llama-server in router mode: every version is a model of its own in the preset file, with the base and one adapter.

The preset file must have a section for the base; a version's section is a copy of it with `lora =`. The other way of
running llama-server, one process with slots of adapters, is `llama_scales`.
"""

import re
import time
from pathlib import Path

import msgspec

from daemon.engines.channel import Channel, checked
from daemon.engines.contract import (
    Capabilities,
    EngineRefused,
    EngineUnavailable,
    Fingerprint,
    Handle,
    Loaded,
    Version,
)
from daemon.engines.gguf_adapter import base_shape, convert
from daemon.engines.llama_scoring import score
from daemon.engines.routes import RouteTable, Tabled
from strategies import request
from strategies.request import Canary

BASE = "base"
POLL_SECONDS = 0.05


class LlamaServer(Tabled):
    """A client of `llama-server --models-preset FILE`, and the keeper of that file."""

    def __init__(
        self,
        url: str,
        preset: Path,
        routes: RouteTable,
        *,
        token: str | None = None,
        timeout_seconds: float = 30.0,
        slots: int = 3,
    ) -> None:
        """Versions are written as GGUF beside the preset file, which the server and the daemon both must reach."""
        super().__init__(Channel(url, token, timeout_seconds), routes)
        self._preset, self._seconds, self._slots = preset, timeout_seconds, slots

    def capabilities(self) -> Capabilities:
        """The base is the section `[base]`; each slot is a process with a copy of the base."""
        return Capabilities(base=BASE, slots=self._slots, moves_aliases=False)

    def load(self, version: Version) -> Handle:
        """Convert, add to the preset file, let the server read it again, load, and wait until it is loaded."""
        known = self._root(version.name)
        if known not in ("", str(version.path)):
            raise EngineRefused(f"{version.name} is loaded from {known}, not from {version.path}")
        self._add(version)
        if self._states().get(version.name) != "loaded":
            checked(self._http.send("POST", "/models/load", {"model": version.name}))
            try:
                self._await_loaded(version.name)
            except EngineRefused:
                self.unload(version.name)
                raise
        return Handle(name=version.name)

    def loaded(self) -> list[Loaded]:
        """The versions of the preset file that the server has loaded, in the file's order."""
        states = self._states()
        names = [name for name in _SECTION.findall(self._preset.read_text()) if states.get(name) == "loaded"]
        return [
            Loaded(name=name, root=self._root(name), loaded_at=at) for at, name in enumerate(names) if self._root(name)
        ]

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:
        """One token at a time."""
        return Fingerprint(served_by=name, logprobs=[score(self._http, {"model": name}, canary) for canary in canaries])

    def unload(self, name: str) -> None:
        """Cuts the streams that still run on it: whoever follows the aliases must have drained it before."""
        if self._states().get(name) == "loaded":
            checked(self._http.send("POST", "/models/unload", {"model": name}))
        others = [part for part in _parts(self._preset.read_text()) if not part.startswith(f"[{name}]")]
        self._replace("".join(others))
        for file in (self._file(name, "gguf"), self._file(name, "json")):
            file.unlink(missing_ok=True)

    def _add(self, version: Version) -> None:
        """Adapter, then the note of where it came from, then its section: whatever is there already is whole."""
        target, note = self._file(version.name, "gguf"), self._file(version.name, "json")
        parts = _parts(self._preset.read_text())
        base = next((part for part in parts if part.startswith(f"[{BASE}]")), None)
        if base is None:
            raise EngineRefused(f"{self._preset} has no section [{BASE}]")
        if not note.exists():
            self._convert(version, base, target)
            request.write(note, {"root": str(version.path)})
        if not any(part.startswith(f"[{version.name}]") for part in parts):
            section = base.replace(f"[{BASE}]", f"[{version.name}]").rstrip() + f"\nlora = {target}\n"
            self._replace("".join(parts).rstrip() + "\n\n" + section)
        checked(self._http.send("GET", "/models?reload=1"))

    def _convert(self, version: Version, base: str, target: Path) -> None:
        model = re.search(r"^model *= *(.+)$", base, re.MULTILINE)
        if model is None:
            raise EngineRefused(f"{self._preset}: [{BASE}] has no line `model = FILE.gguf`")
        partial = target.with_suffix(".tmp")
        try:
            convert(version.path, base_shape(Path(model[1].strip())), partial)
        except (OSError, ValueError, KeyError) as error:
            raise EngineRefused(f"{version.path} cannot be made a GGUF adapter: {error}") from error
        partial.replace(target)

    def _await_loaded(self, name: str) -> None:
        deadline = time.monotonic() + self._seconds
        while (state := self._states().get(name)) != "loaded":
            if state in ("failed", None):
                raise EngineRefused(f"llama-server cannot load {name} (state {state}); its log says why")
            if time.monotonic() > deadline:
                raise EngineUnavailable(f"llama-server has been loading {name} for {self._seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def _states(self) -> dict[str, str]:
        rows = self._http.call("GET", "/models")["data"]
        return {row["id"]: "failed" if row["status"].get("failed") else row["status"]["value"] for row in rows}

    def _root(self, name: str) -> str:
        note = self._file(name, "json")
        return str(msgspec.json.decode(note.read_bytes())["root"]) if note.exists() else ""

    def _file(self, name: str, suffix: str) -> Path:
        return self._preset.with_name(f"{name}.{suffix}")

    def _replace(self, text: str) -> None:
        partial = self._preset.with_name(f".{self._preset.name}.tmp")
        partial.write_text(text)
        partial.replace(self._preset)


_SECTION = re.compile(r"^\[(.+)\]$", re.MULTILINE)


def _parts(text: str) -> list[str]:
    """What stands before the first section, and each section with its heading."""
    return re.split(r"^(?=\[)", text, flags=re.MULTILINE)
