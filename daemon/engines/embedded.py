"""The embedded engine (`python -m serving`) over HTTP."""

import time
import weakref
from pathlib import Path
from typing import Any

import httpx

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
from strategies.request import Canary

BUSY = {408, 425, 429}


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
        transport = httpx.HTTPTransport(uds=str(uds) if uds else None)
        timeout = httpx.Timeout(timeout_seconds, connect=min(2.0, timeout_seconds))
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, transport=transport, headers=headers, timeout=timeout)
        self._busy_seconds = busy_seconds
        self._close = weakref.finalize(self, self._http.close)

    def capabilities(self) -> Capabilities:
        """As `/health` says."""
        body = self._call("GET", "/health")
        return Capabilities(base=body["base"], slots=body["slots"], moves_aliases=True)

    def load(self, version: Version) -> Handle:
        """`POST /v1/load_lora_adapter`; a slot that drains or another load is waited for."""
        known = next((row for row in self.loaded() if row.name == version.name and row.state == "loaded"), None)
        if known is not None:
            return _same(known, version)
        asked = {
            "lora_name": version.name,
            "lora_path": str(version.path),
            "expected_generation": version.generation,
        }
        body = self._patiently("/v1/load_lora_adapter", asked)
        return Handle(
            name=version.name,
            generation=body["adapter_generation"],
            stage_ms=body["stage_ms"],
            commit_ms=body["commit_ms"],
        )

    def loaded(self) -> list[Loaded]:
        """`GET /v1/lora_adapters`."""
        rows = self._call("GET", "/v1/lora_adapters")["data"]
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
        answers = [self._call("POST", "/v1/completions", score_request(name, canary)) for canary in canaries]
        versions = {answer["model"] for answer in answers}
        if len(versions) != 1:
            raise EngineUnavailable(f"{name} moved during the probe: answered by {sorted(versions)}")
        scores = [scored(answer, canary) for answer, canary in zip(answers, canaries, strict=True)]
        return Fingerprint(served_by=versions.pop(), logprobs=scores)

    def aliases(self) -> dict[str, str]:
        """`GET /v1/aliases`."""
        table: dict[str, str] = self._call("GET", "/v1/aliases")["aliases"]
        return table

    def route(self, alias: str, target: str, expected: str | None) -> Routed:
        """`PUT /v1/aliases/{alias}` by compare-and-swap."""
        response = self._send("PUT", f"/v1/aliases/{alias}", {"target": target, "expected_target": expected})
        if response.status_code == 409:
            raise EngineUnavailable(_reason(response))
        body = _checked(response)
        return Routed(previous=body["previous"], flip_ms=body["flip_ms"])

    def unload(self, name: str) -> None:
        """`POST /v1/unload_lora_adapter`."""
        response = self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if response.status_code != 404:
            _checked(response)

    def health(self) -> Health:
        """`GET /health`."""
        try:
            body = self._call("GET", "/health")
        except (EngineUnavailable, EngineRefused) as error:
            return Health(ok=False, reason=str(error))
        return Health(ok=body["ok"], epoch=body["epoch"])

    def close(self) -> None:
        """Give the connections back."""
        self._close()

    def _patiently(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask again while the engine says 429 with a time to wait."""
        deadline = time.monotonic() + self._busy_seconds
        while True:
            response = self._send("POST", path, body)
            pause = float(response.headers.get("Retry-After", 1))
            if response.status_code != 429 or time.monotonic() + pause > deadline:
                return _checked(response)
            time.sleep(pause)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return _checked(self._send(method, path, body))

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            return self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"{method} {self._http.base_url}{path}: {error!r}") from error


def score_request(name: str, canary: Canary) -> dict[str, Any]:
    """The body that makes an OpenAI-compatible engine score a canary's tokens without generating any."""
    tokens = [*canary.prompt_token_ids, *canary.token_ids]
    return {"model": name, "prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}


def scored(answer: dict[str, Any], canary: Canary) -> list[float]:
    """The log-probabilities of the canary's `token_ids` in the answer to `score_request`."""
    try:
        scores = answer["choices"][0]["logprobs"]["token_logprobs"]
        start = len(canary.prompt_token_ids)
        return [float(value) for value in scores[start : start + len(canary.token_ids)]]
    except (KeyError, IndexError, TypeError) as error:
        raise EngineRefused(
            f"the engine does not score prompts: no log-probabilities in its answer ({error!r})"
        ) from None


def _same(known: Loaded, version: Version) -> Handle:
    if known.root != str(version.path) or (version.generation not in (None, known.generation)):
        raise EngineRefused(f"{version.name} is loaded from {known.root} ({known.generation}), not {version.path}")
    return Handle(name=known.name, generation=known.generation)


def _checked(response: httpx.Response) -> dict[str, Any]:
    """The body of a success; the exception that the status stands for."""
    if response.is_success:
        try:
            body: dict[str, Any] = response.json()
        except ValueError as error:
            raise EngineUnavailable(f"{response.url} answered with no JSON: {error}") from None
        return body
    message = f"{response.request.method} {response.url}: {response.status_code} {_reason(response)}"
    is_transient = response.status_code in BUSY or response.is_server_error
    raise (EngineUnavailable if is_transient else EngineRefused)(message)


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
