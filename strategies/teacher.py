"""Who rewords examples: any server that speaks OpenAI's chat protocol, or the version that the run continues."""

import os
from collections.abc import Callable

import httpx

from buffers.example import Example, Message
from strategies.adapter import Adapter
from strategies.canary import decode
from strategies.catalog import Rewrite
from strategies.dataset import prompt_tokens
from strategies.failure import Failure

Teacher = Callable[[str], str]
"""An order in words -> the answer."""
TOKENS = 256
SECONDS = 120.0
"""Within the daemon's `hang_seconds`: one answer is a sign of life."""


def teacher_of(parameters: Rewrite, adapter: Adapter, seed: int) -> Teacher:
    """The server at `teacher_url`, or without one the adapter's present weights."""
    if not parameters.teacher_url:
        return lambda order: _own(adapter, order)
    return lambda order: _served(parameters, order, seed)


def _own(adapter: Adapter, order: str) -> str:
    """Greedy, so that a run that is begun again says the same."""
    asked: str | tuple[Message, ...] = (Message(role="user", content=order),)
    if adapter.tokenizer.chat_template is None:
        asked = order
    start = prompt_tokens(Example(shape="demonstration", prompt=asked, completion="-"), adapter.tokenizer)
    (said,) = decode(adapter, [start], do_sample=False, max_new_tokens=TOKENS)
    return str(adapter.tokenizer.decode(said, skip_special_tokens=True))


def _served(parameters: Rewrite, order: str, seed: int) -> str:
    """One chat completion; raises `Failure` where the server does not give one."""
    url = parameters.teacher_url.rstrip("/") + "/chat/completions"
    token = os.environ.get(parameters.teacher_token_variable, "") if parameters.teacher_token_variable else ""
    body = {
        "model": parameters.teacher_model, "messages": [{"role": "user", "content": order}],
        "temperature": 0.7, "seed": seed, "max_tokens": TOKENS,
    }  # fmt: skip
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = httpx.post(url, json=body, headers=headers, timeout=SECONDS).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"] or "")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        raise Failure("teacher", f"{url} gave no answer to reword an example: {error!r}; is it running?") from error
