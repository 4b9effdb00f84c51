"""The embedded engine (`python -m serving`) over HTTP."""

from pathlib import Path

from daemon.engines.channel import Channel, checked, reason
from daemon.engines.contract import (
    Capabilities,
    EngineRefused,
    EngineUnavailable,
    Fingerprint,
    Handle,
    Health,
    Loaded,
    Routed,
    Version,
)
from daemon.engines.scoring import score_request, scored
from strategies.request import Canary


class Embedded:
    """A client of one embedded engine."""

    def __init__(
        self,
        url: str,
        *,
        uds: Path | None = None,
        token: str | None = None,
        timeout_seconds: float = 30.0,
        busy_seconds: float = 30.0,
    ) -> None:
        """`url` is only a name when `uds` is given; a load waits up to `busy_seconds` for a draining slot."""
        self._http = Channel(f"unix:{uds}" if uds else url, token, timeout_seconds)
        self._busy_seconds = busy_seconds

    def capabilities(self) -> Capabilities:
        """As `/health` says."""
        body = self._http.call("GET", "/health")
        return Capabilities(base=body["base"], slots=body["slots"], moves_aliases=True)

    def load(self, version: Version) -> Handle:
        """`POST /v1/load_lora_adapter`; a slot that drains or another load is waited for."""
        known = next((row for row in self.loaded() if row.name == version.name and row.state == "loaded"), None)
        if known is not None:
            return same(known, version)
        asked = {
            "lora_name": version.name,
            "lora_path": str(version.path),
            "expected_generation": version.generation,
        }
        body = self._http.patiently("/v1/load_lora_adapter", asked, self._busy_seconds)
        return Handle(
            name=version.name,
            generation=body["adapter_generation"],
            stage_ms=body["stage_ms"],
            commit_ms=body["commit_ms"],
        )

    def loaded(self) -> list[Loaded]:
        """`GET /v1/lora_adapters`."""
        rows = self._http.call("GET", "/v1/lora_adapters")["data"]
        loaded = [
            Loaded(
                name=row["name"], root=row["root"], generation=row["adapter_generation"], state=row["state"],
                leases=row["leases"], loaded_at=row["loaded_at"],
            )
            for row in rows
        ]  # fmt: skip
        return sorted(loaded, key=lambda row: row.loaded_at)

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:
        """Score each canary by `POST /v1/completions` with its token ids, `echo`, and nothing to generate."""
        answers = [self._http.call("POST", "/v1/completions", score_request(name, canary)) for canary in canaries]
        versions = {answer["model"] for answer in answers}
        if len(versions) != 1:
            raise EngineUnavailable(f"{name} moved during the probe: answered by {sorted(versions)}")
        scores = [scored(answer, canary) for answer, canary in zip(answers, canaries, strict=True)]
        return Fingerprint(served_by=versions.pop(), logprobs=scores)

    def aliases(self) -> dict[str, str]:
        """`GET /v1/aliases`."""
        table: dict[str, str] = self._http.call("GET", "/v1/aliases")["aliases"]
        return table

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        """`PUT /v1/aliases/{alias}` by compare-and-swap."""
        response = self._http.send("PUT", f"/v1/aliases/{alias}", {"target": target, "expected_target": expected})
        if response.status_code == 409:
            raise EngineUnavailable(reason(response))
        body = checked(response).json()
        return Routed(previous=body["previous"], flip_ms=body["flip_ms"])

    def unload(self, name: str) -> None:
        """`POST /v1/unload_lora_adapter`."""
        response = self._http.send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if response.status_code != 404:
            checked(response)

    def health(self) -> Health:
        """`GET /health`."""
        try:
            body = self._http.call("GET", "/health")
        except (EngineUnavailable, EngineRefused) as error:
            return Health(ok=False, reason=str(error))
        return Health(ok=body["ok"], epoch=body["epoch"])

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()


def same(known: Loaded, version: Version) -> Handle:
    """The handle of what is loaded already; `EngineRefused` when that is something else: versions are immutable."""
    if known.root != str(version.path) or (version.generation not in (None, known.generation)):
        raise EngineRefused(f"{version.name} is loaded from {known.root} ({known.generation}), not {version.path}")
    return Handle(name=known.name, generation=known.generation)
