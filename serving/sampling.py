"""From logits to a token, and from tokens to text."""

from typing import Any, NamedTuple

import msgspec
import torch


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How one request wants its tokens."""

    max_tokens: int
    temperature: float = 1.0
    """0: the most likely token."""
    top_p: float = 1.0
    """Nucleus sampling (Holtzman et al., arXiv:1904.09751)."""
    top_k: int = 0
    """Only so many of the most likely tokens, before `top_p` (Fan et al., arXiv:1805.04833); 0: all."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """Report log-probabilities, and those of so many alternatives."""
    prompt_logprobs: bool = False
    ignore_eos: bool = False


class Scored(NamedTuple):
    """A token and, where asked for, its log-probability and the most likely alternatives."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """The next token from logits (vocabulary,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses top_p stays in
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered.masked_fill(outside, 0.0))
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))  # so that a seed means one thing


def score(logits: torch.Tensor, tokens: list[int], top: int) -> list[Scored]:
    """Log-probabilities under logits (tokens, vocabulary), before temperature, as vLLM and OpenAI report them."""
    norm = logits.logsumexp(-1)
    index = torch.tensor(tokens, device=logits.device)
    own = (logits.gather(1, index[:, None])[:, 0] - norm).tolist()
    if not top:
        return [Scored(token, value) for token, value in zip(tokens, own, strict=True)]
    values, ids = logits.topk(top, -1)
    best = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), (values - norm[:, None]).tolist(), strict=True)]
    return [Scored(token, value, alternatives) for token, value, alternatives in zip(tokens, own, best, strict=True)]


class Transcript:
    """Turns a growing list of tokens into text deltas: no half characters, nothing at or behind a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._prefix = self._read = 0  # decoding restarts at _prefix; up to _read it has been turned into text
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that became certain with this token."""
        self._ids.append(token)
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        if text.endswith("\ufffd") or len(text) <= len(known):  # an unfinished character, or no text
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._release(self._held + text[len(known) :])

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        known = self._decode(self._ids[self._prefix : self._read])
        rest = self._decode(self._ids[self._prefix :])[len(known) :]
        held, self._held = self._held, ""
        return held + rest

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _release(self, text: str) -> str:
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
