"""The two routes that generate: one request -> one lease -> one version, streamed or whole."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serving.answers import Answer
from serving.engine import Engine
from serving.metrics import Metrics
from serving.refusal import Refusal
from serving.registry import Lease
from serving.requests import Call, ChatBody, complete, converse, parse
from serving.scheduler import Generation, Piece
from serving.slots import BASE

VERSION_HEADER = "X-Adapter-Version"
BODY_BYTES = 1 << 20  # of text, which the event loop tokenises while nothing else is admitted


async def completions(request: Request) -> Response:
    """`POST /v1/completions`."""
    return await _answer(request, chat=False)


async def chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    return await _answer(request, chat=True)


async def _answer(request: Request, *, chat: bool) -> Response:
    engine: Engine = request.app.state.engine
    call = _call(engine, await read_body(request), chat=chat)
    running = Running(engine, request.app.state.metrics, call)
    headers = {VERSION_HEADER: running.lease.version}
    answer = Answer(call, running.lease.version, engine.model.tokenizer)
    if call.stream:
        return StreamingResponse(_events(running, answer), media_type="text/event-stream", headers=headers)
    pieces = await _collect(request, running)
    return JSONResponse(answer.whole(pieces), headers=headers)


async def read_body(request: Request) -> bytes:
    """The request's body; `Refusal` 413 beyond `BODY_BYTES`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES:
            raise Refusal(413, f"the request body is larger than {BODY_BYTES} bytes")
    return bytes(body)


def _call(engine: Engine, body: bytes, *, chat: bool) -> Call:
    model = engine.model
    parsed = parse(body, chat=chat)
    if isinstance(parsed, ChatBody):
        return converse(parsed, model.tokenizer, model.context)
    return complete(parsed, model.tokenizer, model.context, model.vocabulary)


class Running:
    """A request from admission to its last piece: holds the lease, and gives it back however the request ends."""

    def __init__(self, engine: Engine, metrics: Metrics, call: Call) -> None:
        self._engine, self._metrics = engine, metrics
        self.lease: Lease = engine.registry.lease(call.model)
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        try:
            slot = BASE if self.lease.adapter is None else self.lease.adapter.slot
            self._generation = Generation(
                call.prompt, call.sampling, slot, engine.model.detokenizer, self._hand_over, self._end
            )
            engine.scheduler.submit(self._generation)
        except BaseException:
            self._end()
            raise
        metrics.admitted(self.lease.version, len(call.prompt))

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Piece by piece; the last one has `finish` or `error`."""
        try:
            while True:
                piece = await self._pieces.get()
                self._metrics.produced(len(piece.tokens))
                yield piece
                if piece.is_last:
                    return
        finally:
            self._engine.scheduler.cancel(self._generation)  # the client is gone; without effect at a regular end

    def _hand_over(self, piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def _end(self) -> None:
        self._engine.registry.release(self.lease)


async def _collect(request: Request, running: Running) -> list[Piece]:
    """All pieces, unless the client hangs up first."""

    async def gather() -> list[Piece]:
        async with contextlib.aclosing(running.pieces()) as pieces:
            return [piece async for piece in pieces]

    work, gone = asyncio.ensure_future(gather()), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal(499, "the client closed the request")
        pieces = work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
    if pieces[-1].error:
        raise Refusal(500, pieces[-1].error)
    return pieces


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(running: Running, answer: Answer) -> AsyncIterator[bytes]:
    """Server-sent events: the chunks, the usage where asked for, and `[DONE]`."""
    async with contextlib.aclosing(running.pieces()) as pieces:
        async for piece in pieces:
            if piece.error:
                yield _event({"error": {"message": piece.error, "type": "InternalServerError", "code": 500}})
                return
            for chunk in answer.chunks(piece):
                yield _event(chunk)
    for chunk in answer.usage_chunk():
        yield _event(chunk)
    yield b"data: [DONE]\n\n"


def _event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
