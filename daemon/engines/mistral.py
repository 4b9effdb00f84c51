"""mistral.rs: vLLM's routes with a listing of its own, where generations and their running requests stand.

It scores no given tokens: the probe compares its greedy answers, as with LoRAX. A name is loaded once and never
replaced (`load_inplace`), although this server could: the alias moves in front of it.
"""

from typing import Any

from daemon.engines.channel import Channel, checked
from daemon.engines.contract import (
    Capabilities,
    EngineRefused,
    Fingerprint,
    Handle,
    Loaded,
    Version,
)
from daemon.engines.routes import RouteTable, Tabled
from daemon.engines.scoring import greedy_request, greedy_scores
from strategies.request import Canary

BASE = "default"
"""By this name mistral.rs answers with the model that it was started with."""


class Mistral(Tabled):
    """A client of one mistral.rs server with `MISTRALRS_ALLOW_RUNTIME_LORA_UPDATING=1`."""

    def __init__(
        self, url: str, routes: RouteTable, *, token: str | None = None, timeout_seconds: float = 30.0
    ) -> None:
        super().__init__(Channel(url, token, timeout_seconds), routes)
        self._seconds = timeout_seconds

    def capabilities(self) -> Capabilities:
        """As many slots as its listing says."""
        return Capabilities(base=BASE, slots=self._listing()["max_adapters"], moves_aliases=False)

    def load(self, version: Version) -> Handle:
        """`POST /v1/load_lora_adapter`; another load is waited for. What is loaded under that name is not replaced."""
        known = next((row for row in self.loaded() if row.name == version.name), None)
        if known is None:
            asked = {"lora_name": version.name, "lora_path": str(version.path)}
            body = self._http.patiently("/v1/load_lora_adapter", asked, self._seconds)
            return Handle(name=version.name, generation=body["generation"])
        if known.root not in ("", str(version.path)):
            raise EngineRefused(f"{version.name} is loaded from {known.root}, not from {version.path}")
        return Handle(name=version.name, generation=known.generation)

    def loaded(self) -> list[Loaded]:
        """`GET /v1/lora_adapters`; without a root where the server hides its paths."""
        listing = self._listing()
        leases = {row["generation"]: row["active_leases"] for row in listing["generations"]}
        return [
            Loaded(
                name=row["id"], root=row.get("source") or "", generation=row["generation"], loaded_at=at,
                leases=leases.get(row["generation"], 0),
            )
            for at, row in enumerate(listing["data"])
        ]  # fmt: skip

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:
        """The log-probabilities of the greedy answers, cut to the canaries' lengths."""
        answers = [self._http.call("POST", "/v1/chat/completions", greedy_request(name, each)) for each in canaries]
        return Fingerprint(served_by=name, logprobs=[greedy_scores(answer) for answer in answers])

    def unload(self, name: str) -> None:
        """No new requests; running ones keep their generation to their end."""
        response = self._http.send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if response.status_code != 404:
            checked(response)

    def _listing(self) -> dict[str, Any]:
        found: dict[str, Any] = self._http.call("GET", "/v1/lora_adapters")
        return found
