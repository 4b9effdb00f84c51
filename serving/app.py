"""The HTTP application: routes, the bearer token and the shape of errors."""

import contextlib
import hmac
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import admin, generate
from serving.engine import Engine
from serving.metrics import Metrics
from serving.refusal import Refusal

STOP_SECONDS = 5.0
KINDS = {400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError",
         409: "ConflictError", 413: "BadRequestError", 429: "RateLimitError"}  # fmt: skip

ROUTES = [
    Route("/health", admin.health),
    Route("/metrics", admin.metrics),
    Route("/v1/models", admin.models),
    Route("/v1/completions", generate.completions, methods=["POST"]),
    Route("/v1/chat/completions", generate.chat_completions, methods=["POST"]),
    Route("/v1/lora_adapters", admin.adapters),
    Route("/v1/load_lora_adapter", admin.load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", admin.unload, methods=["POST"]),
    Route("/v1/aliases", admin.aliases),
    Route("/v1/aliases/{alias}", admin.put_alias, methods=["PUT"]),
    Route("/v1/aliases/{alias}", admin.delete_alias, methods=["DELETE"]),
]


def build(engine: Engine, token: str | None) -> ASGIApp:
    """The application for one engine; with a token everything but `/health` asks for it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        engine.scheduler.stop(STOP_SECONDS)

    app = Starlette(
        routes=ROUTES, lifespan=lifespan, exception_handlers={Refusal: _refused, HTTPException: _http_error}
    )
    app.state.engine, app.state.metrics = engine, Metrics(engine)
    return BearerToken(app, token) if token else app


class BearerToken:
    """Lets through what carries the token (RFC 6750)."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The inner application, or 401."""
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await _error(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    request.app.state.metrics.refused(refusal.status)
    after = refusal.retry_after
    return _error(refusal.status, refusal.message, None if after is None else {"Retry-After": str(after)})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    kind = KINDS.get(status, "InternalServerError")
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status, headers=headers
    )
