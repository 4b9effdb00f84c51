"""The front door: takes a request, pins it to one version, and passes the answer through.

A request is pinned when it is admitted: whatever happens to the alias afterwards, its answer comes from that version.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from daemon.gateway.aliases import Aliases
from daemon.gateway.answers import EventStream, Refusal, send_json, with_model
from daemon.gateway.calls import NO_FIELDS, Call, Gone, forwarded, header_of, read_body, request_id_of
from daemon.gateway.shadow import Shadows
from daemon.gateway.split import choose
from daemon.gateway.table import Target
from daemon.gateway.traffic import Ending, Lane, Traffic
from daemon.gateway.upstream import Exchange, Fleet, UpstreamFailed
from daemon.gateway.wire import Headers

log = logging.getLogger("eternad.gateway")
FORWARDED = {"/v1/completions", "/v1/chat/completions"}
TRY_ANOTHER = {502, 503}


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says about requests."""

    sticky_header: bytes = b"x-session-id"
    body_bytes_max: int = 16 * 1024 * 1024
    token: str | None = None
    """What clients must show; None: nothing, and what they show goes on to the engine."""


class Front:
    """The ASGI application for clients."""

    def __init__(self, aliases: Aliases, traffic: Traffic, fleet: Fleet, rules: Rules) -> None:
        self._aliases, self._traffic, self._fleet, self._rules = aliases, traffic, fleet, rules
        self._expected = f"Bearer {rules.token}".encode() if rules.token else None
        self._shadows = Shadows(traffic, self._whole)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        request_id = request_id_of(scope["headers"])
        try:
            await self._answer(scope, receive, send, request_id)
        except Refusal as refusal:
            await send_json(send, refusal.status, refusal.body(), [(b"x-request-id", request_id)])
        except Gone:
            return

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: bytes) -> None:
        method, path = scope["method"], scope["path"]
        if path == "/health" and method in ("GET", "HEAD"):
            return await send_json(send, 200, b'{"ok":true}', [])
        self._authorize(scope["headers"])
        if path == "/v1/models" and method == "GET":
            return await send_json(send, 200, self._models(), [(b"x-request-id", request_id)])
        if path not in FORWARDED:
            known = ", ".join(["/v1/models", *sorted(FORWARDED)])
            raise Refusal(404, f"no such page: {path}; there are {known}", "not_found")
        if method != "POST":
            raise Refusal(405, f"{path} takes POST")
        call = Call(scope, await read_body(receive, self._rules.body_bytes_max), request_id)
        await self._forward(call, receive, send)

    def _authorize(self, headers: Headers) -> None:
        if self._expected and not hmac.compare_digest(header_of(headers, b"authorization"), self._expected):
            raise Refusal(401, "give the gateway's token: Authorization: Bearer TOKEN")

    def _models(self) -> bytes:
        """Aliases first, then the versions behind them."""
        roots = {alias: route.targets[0].version for alias, route in self._aliases.table.aliases.items()}
        roots |= {version: version for version in sorted(self._aliases.versions() - roots.keys())}
        said = {"object": "model", "created": 0, "owned_by": "eternad"}
        rows = [{"id": name, **said, "root": root} for name, root in roots.items()]
        return msgspec.json.encode({"object": "list", "data": rows})

    async def _forward(self, call: Call, receive: Receive, send: Send) -> None:
        found = self._aliases.find(call.model)
        if found is None:
            known = ", ".join(self._aliases.table.aliases) or "none yet"
            raise Refusal(404, f"the model `{call.model}` does not exist; there are: {known}")
        alias, route = found
        target = choose(alias, route, call.key(self._rules.sticky_header))
        self._shadows.sample(call, route)
        lane = self._traffic.lane(target.version)
        since, ending = lane.enter(), "failed"
        watch = _Disconnect(receive)
        try:
            ending = await self._serve(call, target, lane, since, send)
        except asyncio.CancelledError:
            if not watch.is_gone:
                raise
            ending = "cancelled"
        finally:
            watch.stop()
            lane.leave(ending)  # type: ignore[arg-type]

    async def _serve(self, call: Call, target: Target, lane: Lane, since: float, send: Send) -> Ending:
        answer = await self._ask(call, target)
        try:
            lane.first_byte(since)
            headers = [*forwarded(answer.exchange.head.headers), (b"x-request-id", call.request_id),
                       (b"x-adapter-version", target.version.encode())]  # fmt: skip
            if answer.rest is None:
                await _send_whole(send, answer, headers, target.version)
                return "failed" if answer.exchange.status >= 500 else "answered"
            return await _send_stream(send, answer, headers, target.version)
        finally:
            answer.exchange.abort()

    async def _ask(self, call: Call, target: Target, fields: Mapping[str, Any] = NO_FIELDS) -> "_Answer":
        """Of one replica, and of another one if the first fails before the client has got a byte."""
        body, failed, reason = call.body_for(target, fields), None, ""
        headers = call.headers_for_engine(with_authorization=self._expected is None)
        for attempt in range(min(2, len(target.urls))):
            replica = self._fleet.pick(target.urls, failed)
            try:
                answer = await _begin(await replica.send(call.path, headers, body))
                if answer.exchange.status not in TRY_ANOTHER or attempt or len(target.urls) == 1:
                    return answer
                answer.exchange.abort()
                reason = f"{replica.url} answered {answer.exchange.status}"
            except UpstreamFailed as error:
                reason = str(error)
            replica.rest()
            failed = replica.url
            log.warning("%s: %s (request %s)", target.version, reason, call.request_id.decode())
        raise Refusal(502, f"{target.version} cannot be reached: {reason}")

    async def _whole(self, call: Call, target: Target, fields: dict[str, Any]) -> tuple[int, bytes]:
        """Status and body of a request with some fields changed, which is no player's."""
        answer = await self._ask(call, target, fields)
        rest = b"".join([piece async for piece in answer.rest]) if answer.rest is not None else b""
        return answer.exchange.status, answer.first + rest


class _Disconnect:
    """Cancels the task that made it as soon as its client has gone."""

    def __init__(self, receive: Receive) -> None:
        self.is_gone = False
        self._task = asyncio.current_task()
        self._watch = asyncio.create_task(self._wait(receive))

    async def _wait(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        assert self._task is not None  # made inside a request
        self._task.cancel()

    def stop(self) -> None:
        self._watch.cancel()


class _Answer:
    """An answer whose first piece is here: from now on no other replica is asked."""

    def __init__(self, exchange: Exchange, first: bytes, rest: AsyncIterator[bytes] | None) -> None:
        self.exchange, self.first, self.rest = exchange, first, rest


async def _begin(exchange: Exchange) -> _Answer:
    """Event streams to their first piece, everything else to its end."""
    try:
        if not exchange.head.header(b"content-type").startswith(b"text/event-stream"):
            return _Answer(exchange, await exchange.body(), None)
        chunks = exchange.chunks()
        return _Answer(exchange, await anext(chunks, b""), chunks)
    except BaseException:
        exchange.abort()
        raise


async def _send_whole(send: Send, answer: _Answer, headers: Headers, version: str) -> None:
    body = with_model(answer.first, version)
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": answer.exchange.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_stream(send: Send, answer: _Answer, headers: Headers, version: str) -> Ending:
    """Piece by piece; `send` waits while the client does not read. A broken stream ends with an error event."""
    assert answer.rest is not None
    await send({"type": "http.response.start", "status": answer.exchange.status, "headers": headers})
    events = EventStream(version)
    ending: Ending = "answered"
    piece = events.feed(answer.first)
    try:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        async for chunk in answer.rest:
            if piece := events.feed(chunk):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        last = events.rest()
    except UpstreamFailed as error:
        ending = "failed"
        last = b"\n\ndata: " + Refusal(502, f"{version} broke off: {error}").body() + b"\n\n"
    await send({"type": "http.response.body", "body": last})
    return ending
