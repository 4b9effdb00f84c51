"""The fake vLLM as a process of its own that answers chats with the name it was asked for: `uvicorn echo_engine:app`.

What is not loaded is a 404, so that a request which a swap sends astray fails. The answers come from plain ASGI, since
thousands of them are to be asked for in seconds; a stream is sent in two parts, so that it can be cut between them.
"""

import asyncio
import json

from fake_dialects import FakeVllm
from starlette.types import Receive, Scope, Send

WORDS = 5


class EchoEngine(FakeVllm):
    """Speaks word by word."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Chats here, everything else as vLLM does."""
        if scope["type"] != "http" or scope["path"] != "/v1/chat/completions":
            await super().__call__(scope, receive, send)
            return
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        await self._echo(json.loads(b"".join(parts)), send)

    async def _echo(self, body: dict[str, object], send: Send) -> None:
        name = str(body["model"])
        if name not in self.adapters:
            return await answer(send, 404, b"application/json", b'{"error": {"message": "not loaded"}}')
        frame = {"id": "1", "created": 1, "model": name}
        if body.get("stream"):
            event = {
                "object": "chat.completion.chunk",
                **frame,
                "choices": [{"index": 0, "delta": {"content": name + " "}}],
            }
            line = b"data: " + json.dumps(event).encode() + b"\n\n"
            return await answer(send, 200, b"text/event-stream", line * 2, line * (WORDS - 2) + b"data: [DONE]\n\n")
        message = {"role": "assistant", "content": " ".join([name] * WORDS)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        whole = json.dumps({"object": "chat.completion", **frame, "choices": [choice]}).encode()
        await answer(send, 200, b"application/json", whole)


async def answer(send: Send, status: int, kind: bytes, *parts: bytes) -> None:
    """The parts a moment apart."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": parts[-1]})


app = EchoEngine()
