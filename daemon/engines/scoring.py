"""How an OpenAI-compatible engine scores given tokens: `/v1/completions` with `echo` and nothing to generate."""

from typing import Any

from daemon.engines.contract import EngineRefused
from strategies.request import Canary


def score_request(name: str, canary: Canary) -> dict[str, Any]:
    """The body: the canary's prompt and answer as one prompt of token ids."""
    tokens = [*canary.prompt_token_ids, *canary.token_ids]
    return {"model": name, "prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}


def scored(answer: dict[str, Any], canary: Canary) -> list[float]:
    """The log-probabilities of the canary's `token_ids` in the answer."""
    start = len(canary.prompt_token_ids)
    try:
        scores = answer["choices"][0]["logprobs"]["token_logprobs"]
        return [float(value) for value in scores[start : start + len(canary.token_ids)]]
    except (KeyError, IndexError, TypeError) as error:
        raise EngineRefused(
            f"the engine does not score prompts: no log-probabilities in its answer ({error!r})"
        ) from None


def greedy_request(name: str, canary: Canary) -> dict[str, Any]:
    """The body for engines that score only what they generate: the canary's prompt as a chat, as long as its answer."""
    return {"model": name, "messages": [{"role": "user", "content": canary.prompt}], "temperature": 0,
            "max_tokens": len(canary.token_ids), "logprobs": True}  # fmt: skip


def greedy_scores(answer: dict[str, Any]) -> list[float]:
    """The log-probabilities of the answer's own tokens."""
    try:
        return [float(token["logprob"]) for token in answer["choices"][0]["logprobs"]["content"]]
    except (KeyError, IndexError, TypeError) as error:
        raise EngineRefused(f"the engine's answer has no log-probabilities ({error!r})") from None
