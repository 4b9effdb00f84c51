"""What clients get: OpenAI's bodies and stream chunks, made of the scheduler's pieces."""

import secrets
import time
from typing import Any

from serving.requests import Call
from serving.sampling import Scored
from serving.scheduler import Piece


class Answer:
    """One request's answer in OpenAI's shape, whole or chunk by chunk."""

    def __init__(self, call: Call, version: str, tokenizer: Any) -> None:
        self._call, self._tokenizer = call, tokenizer
        kind = ("chatcmpl", "chat.completion") if call.chat else ("cmpl", "text_completion")
        self._frame = {"id": f"{kind[0]}-{secrets.token_hex(12)}", "object": kind[1], "created": int(time.time()),
                       "model": version}  # fmt: skip
        self._produced = 0
        self._offset = 0  # characters of the tokens named so far
        self._began = False

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text = (self._call.echo or "") + "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in (*piece.prompt, *piece.tokens)]
        self._produced = sum(len(piece.tokens) for piece in pieces)
        said = {"message": {"role": "assistant", "content": text}} if self._call.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": self._logprobs(tokens), "finish_reason": pieces[-1].finish}
        return {**self._frame, "choices": [choice], "usage": self._usage()}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks for one piece: none while no text has become certain and nothing else is to be told."""
        self._produced += len(piece.tokens)
        choices = []
        if not self._began:
            self._began = True
            choices += self._first()
        tokens = [*piece.prompt, *piece.tokens]
        if piece.text or piece.finish or (tokens and self._call.sampling.logprobs is not None):
            said = {"delta": {"content": piece.text} if piece.text else {}} if self._call.chat else {"text": piece.text}
            choices.append({**said, "logprobs": self._logprobs(tokens), "finish_reason": piece.finish})
        return [self._chunk([{"index": 0, **choice}]) for choice in choices]

    def usage_chunk(self) -> list[dict[str, Any]]:
        """The last chunk of a stream that asked for `include_usage`."""
        return [{**self._chunk([]), "usage": self._usage()}] if self._call.include_usage else []

    def _first(self) -> list[dict[str, Any]]:
        if self._call.chat:
            return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
        return [{"text": self._call.echo, "logprobs": None, "finish_reason": None}] if self._call.echo else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._call.chat else "text_completion"
        return {**self._frame, "object": kind, "choices": choices}

    def _usage(self) -> dict[str, int]:
        read = len(self._call.prompt)
        return {"prompt_tokens": read, "completion_tokens": self._produced, "total_tokens": read + self._produced}

    def _logprobs(self, tokens: list[Scored]) -> dict[str, Any] | None:
        if self._call.sampling.logprobs is None:
            return None
        return self._chat_logprobs(tokens) if self._call.chat else self._legacy_logprobs(tokens)

    def _chat_logprobs(self, tokens: list[Scored]) -> dict[str, Any]:
        content = [
            {**self._named(scored.token, scored.logprob), "top_logprobs": [self._named(*pair) for pair in scored.top]}
            for scored in tokens
        ]
        return {"content": content}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

    def _legacy_logprobs(self, tokens: list[Scored]) -> dict[str, Any]:
        """Four parallel lists; the first token of a prompt has no log-probability (None)."""
        names = [self._name(scored.token) for scored in tokens]
        offsets = []
        for name in names:
            offsets.append(self._offset)
            self._offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [scored.logprob for scored in tokens],
            "top_logprobs": [
                None if scored.logprob is None else {self._name(token): value for token, value in scored.top}
                for scored in tokens
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._call.name_ids else str(self._tokenizer.decode([token]))
