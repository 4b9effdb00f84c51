"""The admin door, on a Unix socket of its own: read and change the table, see what runs, wait for what drains.

Whoever may open the socket (mode 0660) may change the table. `/v1/...` is the front door again, so that the daemon
reaches everything by one socket, without a token.
"""

from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as Page
from starlette.types import ASGIApp, Receive, Scope, Send

from daemon.gateway.aliases import Aliases
from daemon.gateway.answers import Refusal
from daemon.gateway.table import Conflict, InvalidRoute, Route, Target, check
from daemon.gateway.traffic import Traffic

DRAIN_SECONDS_MAX = 3600.0


class Wish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `PUT /aliases/{alias}`."""

    targets: list[Target]
    shadow: Target | None = None
    expected_generation: int | None = None
    """The alias's generation that the writer has seen; 0: it is not there; null: whatever it is."""
    owner: str | None = None
    """The daemon that writes, which then keeps the alias; null: a person, who leaves it to whom it belongs."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /drain`."""

    version: str
    deadline_seconds: float = 30.0


def build(aliases: Aliases, traffic: Traffic, front: ASGIApp, epoch: str) -> ASGIApp:
    """The application; `epoch` differs after every start."""
    pages = _Pages(aliases, traffic, epoch)
    app = Starlette(
        routes=[
            Page("/health", pages.health),
            Page("/aliases", pages.listing),
            Page("/aliases/{alias}", pages.show),
            Page("/aliases/{alias}", pages.put, methods=["PUT"]),
            Page("/aliases/{alias}", pages.delete, methods=["DELETE"]),
            Page("/aliases/{alias}/owner", pages.disown, methods=["DELETE"]),
            Page("/inflight", pages.inflight),
            Page("/traffic", pages.traffic),
            Page("/drain", pages.drain, methods=["POST"]),
        ],
        exception_handlers={
            Conflict: _error(409), InvalidRoute: _error(400), msgspec.DecodeError: _error(400), OSError: _error(507),
            HTTPException: _http_error,
        },
    )  # fmt: skip

    async def either(scope: Scope, receive: Receive, send: Send) -> None:
        await (front if scope["type"] == "http" and scope["path"].startswith("/v1/") else app)(scope, receive, send)

    return either


class _Pages:
    def __init__(self, aliases: Aliases, traffic: Traffic, epoch: str) -> None:
        self._aliases, self._traffic, self._epoch = aliases, traffic, epoch

    async def health(self, _: Request) -> Response:
        return _json({"ok": True, "epoch": self._epoch, "generation": self._aliases.table.generation})

    async def listing(self, _: Request) -> Response:
        return _json(self._aliases.table)

    async def show(self, request: Request) -> Response:
        alias = request.path_params["alias"]
        found = self._aliases.table.aliases.get(alias)
        return _json(found) if found else _error_body(404, f"no alias {alias}", "no_such_alias")

    async def put(self, request: Request) -> Response:
        wish = msgspec.json.decode(await request.body(), type=Wish)
        route = check(Route(targets=wish.targets, shadow=wish.shadow))
        return await self._change(request.path_params["alias"], route, wish.expected_generation, wish.owner)

    async def delete(self, request: Request) -> Response:
        expected = request.query_params.get("expected_generation", "")
        return await self._change(request.path_params["alias"], None, int(expected) if expected.isdecimal() else None)

    async def disown(self, request: Request) -> Response:
        """The alias stays as it is, and any daemon may keep it."""
        alias = request.path_params["alias"]
        found = self._aliases.table.aliases.get(alias)
        if found is None:
            return _error_body(404, f"no alias {alias}", "no_such_alias")
        return await self._change(alias, found, found.generation, "")

    async def _change(
        self, alias: str, route: Route | None, expected: int | None, owner: str | None = None
    ) -> Response:
        changed = await self._aliases.change(alias, route, expected, owner)
        self._traffic.forget(self._aliases.versions())
        return _json(changed)

    async def inflight(self, _: Request) -> Response:
        return _json({"epoch": self._epoch, "versions": self._traffic.inflight()})

    async def traffic(self, _: Request) -> Response:
        lanes = self._traffic.lanes.values()
        return _json({"epoch": self._epoch, "versions": {lane.version: lane.summary() for lane in lanes},
                      "comparisons": self._traffic.comparisons})  # fmt: skip

    async def drain(self, request: Request) -> Response:
        """Waits; 409 while an alias would only refill it."""
        wish = msgspec.json.decode(await request.body(), type=Drain)
        if self._aliases.is_named(wish.version):
            return _error_body(409, f"an alias still points to {wish.version}: move it first", "still_named")
        lane = self._traffic.lanes.get(wish.version)
        seconds = min(max(wish.deadline_seconds, 0.0), DRAIN_SECONDS_MAX)
        is_drained = lane is None or await lane.drained(seconds)
        return _json({"version": wish.version, "drained": is_drained, "inflight": lane.inflight if lane else 0})


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _error_body(status: int, message: str, code: str | None = None) -> Response:
    return Response(Refusal(status, message, code).body(), status, media_type="application/json")


def _error(status: int) -> Any:
    def answer(_: Request, error: Exception) -> Response:
        return _error_body(status, str(error), "conflict" if status == 409 else None)

    return answer


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # registered for it alone
    return _error_body(error.status_code, str(error.detail), "not_found")
