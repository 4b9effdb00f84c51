"""Any server with vLLM's routes for adapters: a fork of vLLM, a server that copies its API, vLLM behind a thin proxy.

Only what they have in common is asked for: load, unload, the list of models, and chats with log-probabilities. So the
proof is a greedy answer, as with LoRAX; listings may leave out `root` and `parent`.
"""

from typing import Any

from daemon.engines.channel import Channel
from daemon.engines.contract import Capabilities, EngineRefused, EngineUnavailable, Fingerprint
from daemon.engines.scoring import greedy_request, greedy_scores
from daemon.engines.vllm import Vllm
from strategies.request import Canary


class VllmShaped(Vllm):
    """A client of one or several replicas of such a server."""

    def capabilities(self) -> Capabilities:
        """The base is the first model of the list that is no adapter."""
        url, rows = self._replicas[0].url, self._models(self._replicas[0])
        base = next((row["id"] for row in rows if not _is_adapter(row)), None)
        if base is None:
            raise EngineRefused(f"{url} lists no base model")
        return Capabilities(base=base, slots=self._slots, moves_aliases=False)

    def _adapters(self, replica: Channel) -> dict[str, str]:
        return {row["id"]: row.get("root") or "" for row in self._models(replica) if _is_adapter(row)}

    def _probe_one(self, replica: Channel, name: str, canaries: list[Canary]) -> Fingerprint:
        """The log-probabilities of the greedy answers, cut to the canaries' lengths."""
        answers = [replica.call("POST", "/v1/chat/completions", greedy_request(name, each)) for each in canaries]
        if {answer["model"] for answer in answers} != {name}:
            raise EngineUnavailable(f"{replica.url}: {name} is answered by {sorted({a['model'] for a in answers})}")
        return Fingerprint(served_by=name, logprobs=[greedy_scores(answer) for answer in answers])


def _is_adapter(row: dict[str, Any]) -> bool:
    """It has a parent, or where a server does not say so, a version's name (`npc@0007`)."""
    return bool(row.get("parent")) or "@" in row["id"]
