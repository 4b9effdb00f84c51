"""What the rollout tests share: an engine in memory behind a gateway in memory, whose numbers a test writes."""

from typing import Any

from service_kit import MemoryEngine

from daemon.engines.contract import EngineUnavailable, Routed
from daemon.engines.exposure import Split


class MemoryGateway(MemoryEngine):
    """The contract with aliases that can be shared."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: dict[str, Split] = {}
        self.seen: list[tuple[str, Split | None]] = []
        """Every change of an alias: the stable version and what shares it."""
        self.life = "first"
        self.versions: dict[str, dict[str, Any]] = {}
        self.comparisons: dict[str, dict[str, Any]] = {}

    def splits(self) -> dict[str, Split]:
        self._check()
        return dict(self.shares)

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        return self.split(alias, target, None, expected)

    def split(self, alias: str, stable: str, split: Split | None, expected: str | None) -> Routed:
        self._check()
        if self.table.get(alias) != expected:
            raise EngineUnavailable("somebody else moved the alias")
        previous = self.table.get(alias)
        if previous != stable:
            super().route(alias, stable, expected)
        self.shares.pop(alias, None)
        if split is not None:
            self.shares[alias] = split
        self.seen.append((stable, split))
        return Routed(previous=previous)

    def traffic(self) -> dict[str, Any]:
        self._check()
        return {"epoch": self.life, "versions": self.versions, "comparisons": self.comparisons}

    def answer(self, name: str, answered: int, failed: int = 0, ms: float = 10.0) -> None:
        """Players ask, and a version answers so often."""
        row = self.versions.setdefault(name, {"answered": 0, "failed": 0, "first_byte_ms": {}})
        row["answered"] += answered
        row["failed"] += failed
        row["first_byte_ms"] = {"p50": ms}

    def compare(self, candidate: str, pairs: int, divergence: float, failed: int = 0, ms: float = 10.0) -> None:
        """So many pairs of answers differ so much each."""
        sides = {"answered": 0, "failed": 0, "ms": 0.0}
        row = self.comparisons.setdefault(
            candidate, {"pairs": 0, "divergence": 0.0, "candidate": {**sides}, "stable": {**sides}}
        )
        row["pairs"] += pairs
        row["divergence"] += pairs * divergence
        row["candidate"] = {"answered": pairs, "failed": failed, "ms": pairs * ms}
        row["stable"] = {"answered": pairs + failed, "failed": 0, "ms": (pairs + failed) * 10.0}

    def close(self) -> None:
        """Nothing to give back."""
