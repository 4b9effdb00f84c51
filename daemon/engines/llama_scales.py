"""llama-server without a router: one process, the base in memory once, and slots of adapters, read at its start.

Each slot is a GGUF file of the command line (`--lora-scaled slot-0.gguf:0,slot-1.gguf:0,...`); the field `lora` of a
request says which slot answers, so an alias moves between slots without a seam. A new version is written into a free
slot's file and is there after the next start, which this client waits for. What a slot holds the process says itself:
the file's label (name and directory) comes back in `GET /lora-adapters`.

Every request must name its slot, the base's too: one without `lora` is answered from the cache of whoever was asked
before with the same prompt (seen with b10434).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from daemon.engines.channel import Channel
from daemon.engines.contract import (
    Capabilities,
    EngineRefused,
    EngineUnavailable,
    Fingerprint,
    Handle,
    Health,
    Loaded,
    Version,
)
from daemon.engines.gguf_adapter import base_shape, convert, write_empty
from daemon.engines.llama_scoring import score
from daemon.engines.routes import RouteTable, Tabled
from strategies import request
from strategies.request import Canary

BASE = "base"
POLL_SECONDS = 0.1


class LlamaScales(Tabled):
    """A client of `llama-server --lora-scaled`, and the keeper of its slots' files."""

    def __init__(
        self,
        url: str,
        directory: Path,
        base: Path,
        routes: RouteTable,
        *,
        token: str | None = None,
        timeout_seconds: float = 30.0,
        slots: int = 3,
    ) -> None:
        """`directory`: where the slots' files are, for server and daemon alike; `base`: the base model's GGUF file."""
        super().__init__(Channel(url, token, timeout_seconds), routes)
        self._files = [directory / f"slot-{number}.gguf" for number in range(slots)]
        self._notes, self._base, self._seconds = directory / "slots.json", base, timeout_seconds

    def capabilities(self) -> Capabilities:
        """As many slots as the command line has."""
        return Capabilities(base=BASE, slots=len(self._files), moves_aliases=False)

    def load(self, version: Version) -> Handle:
        """Write it into a free slot's file, and wait until llama-server has been started again and holds it."""
        label = f"{version.name} {version.path}"
        wanted = self._wanted()
        other = next((each for each in wanted if each.split(" ", 1)[0] == version.name and each != label), None)
        if other is not None:
            raise EngineRefused(f"{other.replace(' ', ' is loaded from ', 1)}, not from {version.path}")
        if label not in wanted:
            self._fill(wanted, version, label)
        deadline = time.monotonic() + self._seconds
        while label not in self._held_if_any():
            if time.monotonic() > deadline:
                raise EngineUnavailable(f"{version.name} lies in its slot: start llama-server again, it reads it then")
            time.sleep(POLL_SECONDS)
        return Handle(name=version.name)

    def loaded(self) -> list[Loaded]:
        """What the process holds and still should, in the slots' order."""
        both = zip(self._held(), self._wanted(), strict=True)
        labels = [held.split(" ", 1) for held, wanted in both if held and held == wanted]
        return [Loaded(name=name, root=root, loaded_at=at) for at, (name, root) in enumerate(labels)]

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:
        """One token at a time."""
        chosen = {"lora": self.lora(name)}
        return Fingerprint(served_by=name, logprobs=[score(self._http, chosen, canary) for canary in canaries])

    def lora(self, name: str) -> list[dict[str, Any]]:
        """The field of a request that makes this version answer; raises `EngineRefused` if no slot holds it."""
        if name == BASE:
            return [{"id": 0, "scale": 0.0}]
        names = [label.split(" ", 1)[0] for label in self._held()]
        if name not in names:
            raise EngineRefused(f"no slot of llama-server holds {name}")
        return [{"id": names.index(name), "scale": 1.0}]

    def unload(self, name: str) -> None:
        """Its slot is free for the next version; until the next start it still answers what has begun."""
        self._note([("" if label.split(" ", 1)[0] == name else label) for label in self._wanted()])

    def health(self) -> Health:
        """As with all; slots without a file get an adapter that changes nothing, else llama-server would not start."""
        missing = [file for file in self._files if not file.exists()]
        try:
            for file in missing:
                self._replace(file, lambda partial: write_empty(base_shape(self._base), partial))
        except (OSError, ValueError, KeyError) as error:
            return Health(ok=False, reason=f"{self._files[0].parent}: no file for a slot can be written: {error}")
        return super().health()

    def _fill(self, wanted: list[str], version: Version, label: str) -> None:
        """The file, then the note: a file without a note is only written again."""
        if "" not in wanted:
            raise EngineUnavailable(f"all {len(wanted)} slots of llama-server are taken: {', '.join(wanted)}")
        again = [slot for slot, text in enumerate(self._held()) if text == label and not wanted[slot]]
        slot = again[0] if again else wanted.index("")
        self._write(self._files[slot], version, label)  # also where it is held: the file may be another's by now
        self._note([*wanted[:slot], label, *wanted[slot + 1 :]])

    def _write(self, file: Path, version: Version, label: str) -> None:
        try:
            shape = base_shape(self._base)
            self._replace(file, lambda partial: convert(version.path, shape, partial, label))
        except (OSError, ValueError, KeyError) as error:
            raise EngineRefused(f"{version.path} cannot be made a GGUF adapter: {error}") from error

    def _replace(self, file: Path, write: Callable[[Path], None]) -> None:
        partial = file.with_suffix(".tmp")
        write(partial)
        partial.replace(file)

    def _held(self) -> list[str]:
        """The label of every slot as the process has read it."""
        rows = sorted(self._http.call("GET", "/lora-adapters"), key=lambda row: row["id"])
        files = [Path(row["path"]).name for row in rows]
        if files != [file.name for file in self._files]:
            ours = ",".join(f"{file}:0" for file in self._files)
            raise EngineRefused(f"llama-server has the adapters {files}; start it with --lora-scaled {ours}")
        return [row["task_name"] for row in rows]

    def _held_if_any(self) -> list[str]:
        """Nothing while it is starting again."""
        try:
            return self._held()
        except EngineUnavailable:
            return []

    def _wanted(self) -> list[str]:
        """The label of what each slot's file holds for a version, or nothing for a slot that is free."""
        noted = msgspec.json.decode(self._notes.read_bytes(), type=list[str]) if self._notes.exists() else []
        return [*noted, *[""] * len(self._files)][: len(self._files)]

    def _note(self, labels: list[str]) -> None:
        request.write(self._notes, labels)
