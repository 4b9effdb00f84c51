"""An engine behind our gateway: versions are loaded and probed in the engine, the alias moves in the gateway."""

from collections.abc import Callable
from typing import Any

import msgspec

from daemon.engines.channel import Channel, checked, reason
from daemon.engines.contract import (
    ANYWHERE,
    Capabilities,
    Engine,
    EngineUnavailable,
    Fingerprint,
    Handle,
    Health,
    Loaded,
    Routed,
    Version,
)
from daemon.engines.exposure import Split
from daemon.engines.llama_scales import LlamaScales
from strategies.request import Canary

Naming = Callable[[Engine, str], dict[str, Any]]
"""How requests must ask an engine for a version: the fields `model` and `extra` of a gateway's target, or nothing."""
DRAIN_SHARE = 0.8
"""Of the time that a call may take: an answer must still find us waiting."""


def as_it_is(_engine: Engine, _name: str) -> dict[str, Any]:
    """By the version's own name, as nearly all engines do."""
    return {}


def sglang_name(engine: Engine, name: str) -> dict[str, Any]:
    """`BASE:ADAPTER`; a bare adapter's name is answered by the base."""
    base = engine.capabilities().base
    return {} if name == base else {"model": f"{base}:{name}"}


def lorax_name(engine: Engine, name: str) -> dict[str, Any]:
    """The directory, read from the server's own disk."""
    roots = {row.name: row.root for row in engine.loaded()}
    return {"model": roots[name], "extra": {"adapter_source": "local"}} if name in roots else {}


def llama_name(engine: Engine, name: str) -> dict[str, Any]:
    """The slot, where one process has several; a router goes by the name."""
    return {"extra": {"lora": engine.lora(name)}} if isinstance(engine, LlamaScales) else {}


class BehindGateway:
    """Any engine's client, with the gateway's table for its aliases."""

    def __init__(
        self,
        engine: Engine,
        admin: Channel,
        urls: list[str],
        *,
        naming: Naming = as_it_is,
        timeout_seconds: float = 30.0,
        owner: str | None = None,
    ) -> None:
        """`admin`: the gateway's admin socket; `urls`: where the gateway reaches the engine's replicas.

        `owner`: the name under which this daemon keeps its aliases, so that no other one moves them.
        """
        self._engine, self._admin, self._urls, self._naming = engine, admin, urls, naming
        self._owner = owner
        self._drain_seconds = timeout_seconds * DRAIN_SHARE

    def capabilities(self) -> Capabilities:
        """The engine's, and aliases move."""
        return msgspec.structs.replace(self._engine.capabilities(), moves_aliases=True)

    def load(self, version: Version) -> Handle:
        """In the engine."""
        return self._engine.load(version)

    def loaded(self) -> list[Loaded]:
        """Of the engine, with the gateway's count of running requests where it says nothing itself."""
        running: dict[str, int] = self._admin.call("GET", "/inflight")["versions"]
        return [
            msgspec.structs.replace(row, leases=max(row.leases, running.get(row.name, 0)))
            for row in self._engine.loaded()
        ]

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:
        """A version in the engine itself; an alias by a request through the gateway, which says who has answered."""
        if name not in self.aliases():
            return self._engine.probe(name, canaries)
        prompt = canaries[0].prompt if canaries else "-"
        asked = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        served_by = checked(self._admin.send("POST", "/v1/completions", asked)).headers["x-adapter-version"]
        return Fingerprint(served_by=served_by, logprobs=self._engine.probe(served_by, canaries).logprobs)

    def aliases(self) -> dict[str, str]:
        """{alias: its stable version}, of all engines behind this gateway."""
        table: dict[str, Any] = self._admin.call("GET", "/aliases")["aliases"]
        return {alias: route["targets"][0]["version"] for alias, route in table.items()}

    def splits(self) -> dict[str, Split]:
        """What shares an alias with its stable version."""
        table: dict[str, Any] = self._admin.call("GET", "/aliases")["aliases"]
        found = {alias: _split(route) for alias, route in table.items()}
        return {alias: split for alias, split in found.items() if split is not None}

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        """All requests to one version, by compare-and-swap on the alias's generation."""
        return self.split(alias, target, None, expected)

    def split(self, alias: str, stable: str, split: Split | None, expected: str | None) -> Routed:
        """The stable version first. `expected` is the stable version that the alias has now.

        Raises `EngineUnavailable` when somebody else has moved it, or another daemon keeps it.
        """
        route = self._admin.call("GET", "/aliases")["aliases"].get(alias)
        previous = route["targets"][0]["version"] if route else None
        if expected not in (ANYWHERE, previous):
            raise EngineUnavailable(f"{alias} points to {previous}, not to {expected}")
        share = split.share if split is not None and not split.is_shadow else 0.0
        targets = [self._target(stable, 1.0 - share)]
        if split is not None and not split.is_shadow:
            targets.append(self._target(split.candidate, share))
        wish = {
            "targets": targets,
            "shadow": self._target(split.candidate, split.share) if split is not None and split.is_shadow else None,
            "expected_generation": route["generation"] if route else 0,
            "owner": self._owner,
        }
        response = self._admin.send("PUT", f"/aliases/{alias}", wish)
        if response.status_code == 409:
            raise EngineUnavailable(reason(response))
        return Routed(previous=previous, flip_ms=checked(response).json()["flip_ms"])

    def traffic(self) -> dict[str, Any]:
        """How each version has done: `GET /traffic`."""
        found: dict[str, Any] = self._admin.call("GET", "/traffic")
        return found

    def unload(self, name: str) -> None:
        """Once nothing runs on it any more: some engines cut streams, others hold a lock until they end."""
        response = self._admin.send("POST", "/drain", {"version": name, "deadline_seconds": self._drain_seconds})
        if response.status_code == 409:
            raise EngineUnavailable(reason(response))
        drained = checked(response).json()
        if not drained["drained"]:
            raise EngineUnavailable(f"{name} still answers {drained['inflight']} requests")
        self._engine.unload(name)

    def health(self) -> Health:
        """Both must be well. The epoch is the engine's: the gateway forgets nothing when it restarts."""
        try:
            self._admin.call("GET", "/health")
        except EngineUnavailable as error:
            return Health(ok=False, reason=f"the gateway does not answer; start it with: eternad gateway ({error})")
        return self._engine.health()

    def close(self) -> None:
        """Give the connections back."""
        self._admin.close()
        self._engine.close()

    def _target(self, name: str, weight: float) -> dict[str, Any]:
        return {"version": name, "urls": self._urls, "weight": weight, **self._naming(self._engine, name)}


def _split(route: dict[str, Any]) -> Split | None:
    """How a route of the table is shared."""
    first, *others = route["targets"]
    if shadow := route.get("shadow"):
        return Split(candidate=shadow["version"], share=shadow.get("weight", 1.0), is_shadow=True)
    if not others:
        return None
    weight = others[0].get("weight", 1.0)
    return Split(candidate=others[0]["version"], share=round(weight / (weight + first.get("weight", 1.0)), 6))
