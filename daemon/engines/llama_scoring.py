"""llama-server cannot score given tokens, so it is made to sample them, one at a time, and says what they got."""

import contextlib
from collections.abc import Mapping
from typing import Any

from daemon.engines.channel import Channel
from daemon.engines.contract import EngineRefused, EngineUnavailable
from strategies.request import Canary

CERTAIN, WHOLE = 10_000.0, "a"
"""A bias that makes a token certain, and a text of one whole character."""
ALTERNATIVES = 1000
"""Half a character that is not among so many gets the log-probability of the last of them: an upper bound."""


def score(http: Channel, chosen: Mapping[str, Any], canary: Canary) -> list[float]:
    """Log-probabilities of the canary's tokens; `chosen`: the fields of a request that say which version answers."""
    prompt, tokens = canary.prompt_token_ids, canary.token_ids
    return [_logprob(http, chosen, [*prompt, *tokens[:at]], token) for at, token in enumerate(tokens)]


def _logprob(http: Channel, chosen: Mapping[str, Any], known: list[int], token: int) -> float:
    """Of `token` after `known`. A bias decides what is sampled; the log-probabilities are those without it."""
    listed: dict[int, float] = {}
    with contextlib.suppress(EngineUnavailable):
        listed = _listed(http, chosen, known, [token, CERTAIN], 1)
    if token not in listed:  # half a character: sampled, it is not reported or a 500; beside a whole one it is
        listed = _listed(http, chosen, known, [WHOLE, CERTAIN], ALTERNATIVES)
    if not listed:
        raise EngineRefused("llama-server's answer has no log-probabilities")
    return listed.get(token, min(listed.values()))


def _listed(
    http: Channel, chosen: Mapping[str, Any], known: list[int], bias: list[Any], alternatives: int
) -> dict[int, float]:
    """{token: log-probability} of the sampled token and of the most likely ones."""
    asked = {**chosen, "prompt": known, "n_predict": 1, "n_probs": alternatives, "temperature": 0,
             "logit_bias": [bias], "cache_prompt": True}  # fmt: skip
    rows = http.call("POST", "/completion", asked).get("completion_probabilities") or []
    return {row["id"]: float(row["logprob"]) for found in rows for row in (found, *found["top_logprobs"])}
