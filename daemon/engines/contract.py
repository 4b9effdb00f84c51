"""What the daemon wants of an inference engine, whichever it is. Torch-free.

A version is loaded under a name of its own on an immutable path, never in place; a probe proves by log-probabilities
that the engine answers with it; only then does the alias, the name that players' requests use, point to it.
"""

from pathlib import Path
from typing import Protocol

import msgspec

from strategies.request import Canary

ANYWHERE = "*"
"""For `Engine.route`: wherever the alias points now."""


class EngineUnavailable(Exception):
    """No answer, too busy, or changed under our hands: the same call may succeed later."""


class EngineRefused(Exception):
    """The engine answered and will not do it: the same call will fail again."""


class ProbeFailed(EngineRefused):
    """The engine said yes, but does not answer with the version."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A published adapter."""

    model: str
    number: int
    path: Path
    """Its immutable directory, absolute."""
    generation: str | None = None
    """What the engine must find there (embedded engine: SHA-256 of configuration and weights); None: whatever it is."""

    @property
    def name(self) -> str:
        """Its name in the engine: `npc@0007`."""
        return f"{self.model}@{self.number:04d}"


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine can do."""

    base: str
    """The name by which it serves the base model."""
    slots: int
    """Adapters that it keeps ready at once."""
    moves_aliases: bool
    """Whether it routes an alias itself; else clients ask for the name that `aliases()` gives, or a gateway does."""
    can_probe: bool = True
    """Whether it scores canaries; else a version goes live unproven (engine `directory`)."""


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """A version in an engine."""

    name: str
    generation: str | None = None
    stage_ms: float = 0.0
    """Reading and verifying; 0 when it was loaded already or the engine does not say."""
    commit_ms: float = 0.0
    """Copying into the model."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A row of an engine's listing."""

    name: str
    root: str
    generation: str | None = None
    state: str = "loaded"
    """`loaded`, or `draining`: unloaded, with requests that still run."""
    leases: int = 0
    """Requests that run on it, where the engine says."""
    loaded_at: float = 0.0


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine scores the canaries."""

    served_by: str
    """The version that says it has answered."""
    logprobs: list[list[float]]
    """Of each canary's `token_ids`, in the canaries' order."""


class Routed(msgspec.Struct, frozen=True, kw_only=True):
    """A moved alias."""

    previous: str | None
    flip_ms: float = 0.0


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an engine lives, and which life it is."""

    ok: bool
    epoch: str = ""
    """Differs after every start; empty where the engine has no such thing."""
    reason: str = ""


class Engine(Protocol):
    """One running engine, or a fleet of its replicas. A call may raise `EngineUnavailable` or `EngineRefused`."""

    def capabilities(self) -> Capabilities:
        """What it can do, as configured and as it says itself."""

    def load(self, version: Version) -> Handle:
        """Make the version answer to `version.name`; the same again is no error, another one of that name is."""

    def loaded(self) -> list[Loaded]:
        """What is loaded, oldest first, draining ones included."""

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:
        """Score the canaries with whatever answers to `name`: a version, an alias or the base."""

    def aliases(self) -> dict[str, str]:
        """{alias: name of the version, or of the base}."""

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        """Point the alias to a loaded name if it still points to `expected` (None: nowhere; `ANYWHERE`).

        Raises `EngineUnavailable` when somebody else has moved it.
        """

    def unload(self, name: str) -> None:
        """No new requests for it, running ones end in peace; an unknown name is no error."""

    def health(self) -> Health:
        """Never raises."""

    def close(self) -> None:
        """Give the connections back; the engine goes on serving."""
