"""SGLang: vLLM's contract with other routes, and one trap.

An adapter is asked for as `BASE:ADAPTER`; by its bare name the base answers, with status 200. Canaries are scored by
`/generate`, which takes token ids and the adapter's name.
"""

from typing import Any

from daemon.engines.channel import Channel
from daemon.engines.contract import EngineRefused, Fingerprint
from daemon.engines.vllm import Vllm
from strategies.request import Canary


class Sglang(Vllm):
    """A client of SGLang started with `--enable-lora`. Unloading waits for the requests that run on the adapter."""

    LOAD, UNLOAD = "/load_lora_adapter", "/unload_lora_adapter"

    def _probe_one(self, replica: Channel, name: str, canaries: list[Canary]) -> Fingerprint:
        adapter = None if name == self.capabilities().base else name
        scores = [_scored(replica.call("POST", "/generate", _asked(adapter, each)), each) for each in canaries]
        return Fingerprint(served_by=name, logprobs=scores)  # it does not say what answered: the scores must


def _asked(adapter: str | None, canary: Canary) -> dict[str, Any]:
    return {
        "input_ids": [*canary.prompt_token_ids, *canary.token_ids],
        "lora_path": adapter,
        "return_logprob": True,
        "logprob_start_len": 0,
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
    }


def _scored(answer: dict[str, Any], canary: Canary) -> list[float]:
    """`meta_info.input_token_logprobs`: one (log-probability, token id, text) per prompt token, the first without."""
    start = len(canary.prompt_token_ids)
    try:
        rows = answer["meta_info"]["input_token_logprobs"]
        return [float(row[0]) for row in rows[start : start + len(canary.token_ids)]]
    except (KeyError, IndexError, TypeError) as error:
        raise EngineRefused(f"SGLang's answer has no input_token_logprobs ({error!r})") from None
