"""LoRAX: nothing is loaded, every request names a directory.

`adapter_id` (the version's path) and `adapter_source: local` stand in each request; LoRAX reads the directory at the
first one and keeps it by id, so a path must never get other contents. It scores no given tokens: the probe compares
the greedy answer to the canary's prompt with the trainer's, token by token.
"""

from itertools import count

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

BASE = "base"


class Lorax(Tabled):
    """A client of one LoRAX server: requests carry the version's path, its `root` in `loaded()`."""

    def __init__(
        self, url: str, routes: RouteTable, *, token: str | None = None, timeout_seconds: float = 30.0, slots: int = 3
    ) -> None:
        super().__init__(Channel(url, token, timeout_seconds), routes)
        self._slots = slots
        self._known: dict[str, Loaded] = {}
        self._clock = count()

    def capabilities(self) -> Capabilities:
        """LoRAX keeps as many as its memory holds."""
        return Capabilities(base=BASE, slots=self._slots, moves_aliases=False)

    def load(self, version: Version) -> Handle:
        """The first request makes LoRAX read the directory, so that no player waits for it."""
        known = self._known.get(version.name)
        if known is not None and known.root != str(version.path):
            raise EngineRefused(f"{version.name} is {known.root}, not {version.path}")
        warm = {"inputs": "-", "parameters": {**_adapter(str(version.path)), "max_new_tokens": 1}}
        checked(self._http.send("POST", "/generate", warm))
        if known is None:
            self._known[version.name] = Loaded(name=version.name, root=str(version.path), loaded_at=next(self._clock))
        return Handle(name=version.name)

    def loaded(self) -> list[Loaded]:
        """What this client has asked for: LoRAX lists nothing."""
        return list(self._known.values())

    def probe(self, name: str, canaries: list[Canary]) -> Fingerprint:
        """The log-probabilities of the greedy answers, cut to the canaries' lengths."""
        return Fingerprint(served_by=name, logprobs=[self._answer(name, canary) for canary in canaries])

    def unload(self, name: str) -> None:
        """LoRAX evicts by itself what nobody asks for."""
        self._known.pop(name, None)

    def _answer(self, name: str, canary: Canary) -> list[float]:
        root = self._known[name].root if name in self._known else ""
        body = {**greedy_request(root, canary), "adapter_source": "local"}
        return greedy_scores(self._http.call("POST", "/v1/chat/completions", body))


def _adapter(path: str) -> dict[str, str]:
    return {"adapter_id": path, "adapter_source": "local"}
