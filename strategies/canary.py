"""The candidate's own answers to the canary prompts: what a probe of an engine must find again."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from buffers.example import Example, Message
from strategies.adapter import Adapter
from strategies.dataset import prompt_tokens
from strategies.request import Canary

CANARY_TOKENS = 12


@torch.no_grad()
def canaries(adapter: Adapter, prompts: Sequence[str]) -> list[Canary]:
    """The greedy answer to each prompt as a user's message, with its log-probabilities with and without the adapter.

    All prompts are decoded together, with a cache of keys and values, and scored in one pass without padding.
    """
    if not prompts:
        return []
    starts = [_start(adapter, prompt) for prompt in prompts]
    answers = decode(adapter, starts, do_sample=False, max_new_tokens=CANARY_TOKENS)
    with adapter.disabled():
        under_base = _logprobs(adapter, starts, answers)
    return [
        Canary(
            prompt=prompt, prompt_token_ids=start, token_ids=answer, logprobs=own, base_logprobs=base,
            text=str(adapter.tokenizer.decode(answer, skip_special_tokens=True)),
        )
        for prompt, start, answer, own, base in zip(
            prompts, starts, answers, _logprobs(adapter, starts, answers), under_base, strict=True
        )
    ]  # fmt: skip


def _start(adapter: Adapter, prompt: str) -> list[int]:
    asked: str | tuple[Message, ...] = (Message(role="user", content=prompt),)
    if adapter.tokenizer.chat_template is None:
        asked = prompt
    return prompt_tokens(Example(shape="demonstration", prompt=asked, completion="-"), adapter.tokenizer)


def decode(adapter: Adapter, starts: Sequence[Sequence[int]], **how: Any) -> list[list[int]]:
    """The continuation of every start under the present weights, up to and with the token that ends it.

    `how`: fields of transformers' `GenerationConfig`. What is not said, the base's own generation_config.json decides.
    """
    end, width = int(adapter.tokenizer.eos_token_id), max(map(len, starts))
    # all of one length but the padding before them: the next token stands at the same place for everybody
    ids = torch.tensor([[end] * (width - len(start)) + list(start) for start in starts], device=adapter.device)
    mask = torch.tensor([[0] * (width - len(start)) + [1] * len(start) for start in starts], device=adapter.device)
    config = GenerationConfig(repetition_penalty=1.0, eos_token_id=end, pad_token_id=end, **how)
    with adapter.without_dropout():
        whole = adapter.model.get_base_model().generate(ids, attention_mask=mask, generation_config=config)
    rows = whole[:, width:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def _logprobs(adapter: Adapter, starts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[list[float]]:
    """Of each answer's tokens after its start."""
    whole = [torch.tensor(start + answer) for start, answer in zip(starts, answers, strict=True)]
    hidden = adapter.hidden(torch.nn.utils.rnn.pad_sequence(whole, batch_first=True), [len(tokens) for tokens in whole])
    states = hidden.unflatten(0, (len(whole), -1))
    found = []
    for row, start, answer in zip(states, starts, answers, strict=True):
        logprobs = adapter.head.logits(row[len(start) - 1 : len(start) + len(answer) - 1]).log_softmax(-1)
        found.append([float(line[token]) for line, token in zip(logprobs, answer, strict=True)])
    return found
