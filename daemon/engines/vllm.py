"""vLLM, one process or several replicas: each loads for itself, so every call fans out to all of them.

The probe never asks for the log-probabilities of a prompt (`echo`): with adapters and other requests in the same batch
that ends vLLM's engine process and every stream with it (seen with 0.32 on CPU; on a GPU the numbers may be wrong). It
has vLLM generate the canaries' tokens, one request each, and reads what they got before the restriction.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daemon.engines.channel import Channel, checked, reason
from daemon.engines.contract import (
    Capabilities,
    EngineRefused,
    EngineUnavailable,
    Fingerprint,
    Handle,
    Health,
    Loaded,
    ProbeFailed,
    Routed,
    Version,
)
from daemon.engines.proof import TOLERANCE_NATS, distance
from daemon.engines.routes import RouteTable
from strategies.request import Canary

_STARTED = re.compile(r"^process_start_time_seconds (\S+)", re.MULTILINE)


class Vllm:
    """A client of vLLM's OpenAI server with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`."""

    LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

    def __init__(
        self,
        urls: list[str],
        routes: RouteTable,
        *,
        token: str | None = None,
        timeout_seconds: float = 30.0,
        slots: int = 3,
    ) -> None:
        """One url per replica (a load balancer would hide them); `slots` is their `--max-loras`."""
        self._replicas = [Channel(url, token, timeout_seconds) for url in urls]
        self._routes, self._slots = routes, slots

    def capabilities(self) -> Capabilities:
        """The base is the model that has no parent."""
        base = next((row["id"] for row in self._models(self._replicas[0]) if not row.get("parent")), None)
        if base is None:
            raise EngineRefused(f"{self._replicas[0].url} lists no base model")
        return Capabilities(base=base, slots=self._slots, moves_aliases=False)

    def load(self, version: Version) -> Handle:
        """Load into every replica that lacks it; if one refuses, none keeps what this call has loaded."""
        done: list[Channel] = []
        try:
            for replica in self._replicas:
                done += [replica] if self._load_one(replica, version) else []
        except EngineRefused:
            for replica in done:
                self._unload_one(replica, version.name)
            raise
        return Handle(name=version.name)

    def loaded(self) -> list[Loaded]:
        """What any replica lists; `partial` is what another one lacks."""
        listings = [self._adapters(replica) for replica in self._replicas]
        roots = {name: root for listing in listings for name, root in listing.items()}
        return [
            Loaded(
                name=name,
                root=root,
                state="loaded" if all(listing.get(name) == root for listing in listings) else "partial",
                loaded_at=at,
            )
            for at, (name, root) in enumerate(roots.items())
        ]

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:
        """Every replica must give the same fingerprint; `ProbeFailed` names the one that does not."""
        found = [self._probe_one(replica, name, canaries) for replica in self._replicas]
        for replica, fingerprint in zip(self._replicas[1:], found[1:], strict=True):
            if not distance(fingerprint.logprobs, found[0].logprobs) <= TOLERANCE_NATS:
                raise ProbeFailed(f"{name}: {replica.url} does not answer like {self._replicas[0].url}")
        return found[0]

    def aliases(self) -> dict[str, str]:
        """Of the table: vLLM has no aliases."""
        return self._routes.aliases()

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        """In the table."""
        return self._routes.route(alias, target, expected)

    def unload(self, name: str) -> None:
        """From every replica. The version's files must stay until no replica lists it: vLLM 0.32 dies without them."""
        for replica in self._replicas:
            self._unload_one(replica, name)

    def health(self) -> Health:
        """All replicas or none; the epoch is when their processes started."""
        try:
            for replica in self._replicas:
                checked(replica.send("GET", "/health"))
            epoch = " ".join(self._started(replica) for replica in self._replicas)
        except (EngineUnavailable, EngineRefused) as error:
            return Health(ok=False, reason=str(error))
        return Health(ok=True, epoch=epoch)

    def close(self) -> None:
        """Give the connections back."""
        for replica in self._replicas:
            replica.close()

    def _load_one(self, replica: Channel, version: Version) -> bool:
        """Whether there was anything to do."""
        root = self._adapters(replica).get(version.name)
        if root and Path(root) != version.path:
            raise EngineRefused(f"{replica.url}: {version.name} is loaded from {root}, not from {version.path}")
        if root is not None:
            return False
        response = replica.send("POST", self.LOAD, {"lora_name": version.name, "lora_path": str(version.path)})
        if response.status_code == 500:  # vLLM's answer to a torn file or a rank that is too high: it stays so
            raise EngineRefused(f"{replica.url}: {reason(response)}")
        checked(response)
        return True

    def _unload_one(self, replica: Channel, name: str) -> None:
        response = replica.send("POST", self.UNLOAD, {"lora_name": name})
        if response.status_code != 404:
            checked(response)

    def _probe_one(self, replica: Channel, name: str, canaries: list[Canary]) -> Fingerprint:
        answers = [
            [replica.call("POST", "/v1/completions", asked) for asked in _token_requests(name, canary)]
            for canary in canaries
        ]
        named = {answer["model"] for row in answers for answer in row}
        if len(named) != 1:
            raise EngineUnavailable(f"{replica.url}: {name} is answered by {sorted(named)}")
        return Fingerprint(served_by=named.pop(), logprobs=[[_logprob(each) for each in row] for row in answers])

    def _started(self, replica: Channel) -> str:
        """Of its metrics; empty where they are switched off: then a restart is seen by what is missing in the list."""
        found = _STARTED.search(replica.send("GET", "/metrics").text)
        return found[1] if found else ""

    def _adapters(self, replica: Channel) -> dict[str, str]:
        return {row["id"]: row["root"] for row in self._models(replica) if row.get("parent")}

    def _models(self, replica: Channel) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = replica.call("GET", "/v1/models")["data"]
        return rows


def _token_requests(name: str, canary: Canary) -> Iterator[dict[str, Any]]:
    """One for each token of a canary: what comes before it, and that it is the only one allowed."""
    known = list(canary.prompt_token_ids)
    for token in canary.token_ids:
        yield {"model": name, "prompt": list(known), "max_tokens": 1, "temperature": 0, "logprobs": 0,
               "allowed_token_ids": [token], "ignore_eos": True}  # fmt: skip
        known.append(token)


def _logprob(answer: dict[str, Any]) -> float:
    try:
        return float(answer["choices"][0]["logprobs"]["token_logprobs"][0])
    except (KeyError, IndexError, TypeError) as error:
        raise EngineRefused(f"vLLM's answer has no log-probabilities ({error!r})") from None
