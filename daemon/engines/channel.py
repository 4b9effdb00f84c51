"""HTTP to one engine process, with the two kinds of failure that the daemon tells apart."""

import time
import weakref
from typing import Any

import httpx

from daemon.engines.contract import EngineRefused, EngineUnavailable

BUSY = {408, 425, 429}
ONE_REQUEST_EACH = httpx.Limits(max_keepalive_connections=0)
"""A connection that is kept may be closed by the engine just as we send on it (llama-server did on a busy machine), and
the request would look failed although nobody has read it."""


class Channel:
    """Connections to `http://...` or `unix:/path/of/socket`."""

    def __init__(self, url: str, token: str | None, timeout_seconds: float) -> None:
        path = url.removeprefix("unix:") if url.startswith("unix:") else None
        self.url = url
        self._http = httpx.Client(
            base_url="http://engine" if path else url,
            transport=httpx.HTTPTransport(uds=path, limits=ONE_REQUEST_EACH),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout_seconds, connect=min(2.0, timeout_seconds)),
        )
        self.close = weakref.finalize(self, self._http.close)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The answer, whatever its status; `EngineUnavailable` when there is none."""
        try:
            return self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"{method} {self.url}{path}: {error!r}") from error

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of a success (see `checked`)."""
        response = checked(self.send(method, path, body))
        try:
            return response.json()
        except ValueError as error:
            raise EngineUnavailable(f"{response.url} answered with no JSON: {error}") from None

    def patiently(self, path: str, body: dict[str, Any], seconds: float) -> Any:
        """POST; again while the engine says 429, for at most so many seconds."""
        deadline = time.monotonic() + seconds
        response = self.send("POST", path, body)
        while response.status_code == 429:
            pause = float(response.headers.get("Retry-After", 1))
            if time.monotonic() + pause > deadline:
                break
            time.sleep(pause)
            response = self.send("POST", path, body)
        return checked(response).json()


def checked(response: httpx.Response) -> httpx.Response:
    """The answer if it is a success; else `EngineUnavailable` for 5xx and busy, `EngineRefused` for other statuses."""
    if response.is_success:
        return response
    message = f"{response.request.method} {response.url}: {response.status_code} {reason(response)}"
    is_transient = response.status_code in BUSY or response.is_server_error
    raise (EngineUnavailable if is_transient else EngineRefused)(message)


def reason(response: httpx.Response) -> str:
    """What an error says, in the shapes that engines use, or as text."""
    try:
        body = response.json()
        said = body.get("error") or body.get("error_message") or body["message"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.text[:200]
