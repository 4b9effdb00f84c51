"""The pages' routes, and what stands in front of them: the host check, the headers, the token."""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daemon import wording
from daemon.config import Config
from daemon.control import Command, Commands, Order, Snapshot
from daemon.state import database
from daemon.state.database import Connection
from daemon.web import charts, pages

HERE = Path(__file__).parent
COOKIE = "eternad_session"
BODY_BYTES_MAX = 4096
ANSWER_SECONDS = 10.0
HEADERS = {
    # nothing but our own files, no frames, no inline script or style: what players write stays text
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store",
}  # fmt: skip
LOCAL = re.compile(r"(127\.\d+\.\d+\.\d+|localhost|\[::1\])(:\d+)?")


class Site:
    """What every request works on."""

    def __init__(self, config: Callable[[], Config], commands: Commands, snapshot: Snapshot) -> None:
        self.config, self.commands, self.snapshot = config, commands, snapshot
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self.templates.globals |= {"charts": charts}
        self.templates.filters |= {
            "ago": wording.ago, "clock": wording.clock, "duration": wording.duration, "size": wording.size,
            "version": wording.version, "safe_text": wording.safe,
        }  # fmt: skip

    @contextmanager
    def database(self) -> Iterator[Connection]:
        """A read-only connection of this request's own."""
        connection = database.open_read_only(self.config().state_directory / "eternad.db")
        try:
            yield connection
        finally:
            connection.close()

    def token(self) -> str | None:
        """What an action must prove to know; None when the page only shows."""
        path = self.config().web.token_file
        return None if path is None else path.read_text("utf-8").strip() or None


def build(config: Callable[[], Config], commands: Commands, snapshot: Snapshot) -> ASGIApp:
    """The application."""
    app = Starlette(
        routes=[
            Route("/", overview), Route("/models/{model}", model), Route("/runs", runs), Route("/runs/{run}", run),
            Route("/quarantine", quarantine), Route("/log", log), Route("/metrics", metrics),
            Route("/static/{name}", static), Route("/session", sign_in, methods=["POST"]),
            Route("/sign-out", sign_out, methods=["POST"]), Route("/orders", order, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _failed},
    )  # fmt: skip
    app.state.site = Site(config, commands, snapshot)
    return Guard(app)


class Guard:
    """Refuses other hosts' names (DNS rebinding) and other sites' posts (CSRF), and sets the headers of all answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The inner application's answer, or 403."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = formatdate(usegmt=True).encode()  # uvicorn's own would need a wake-up each second
                message["headers"] = [*message["headers"], *_ENCODED, (b"date", date)]
            await send(message)

        app = self._app if scope["type"] == "http" and _is_welcome(scope) else Response("wrong host or origin\n", 403)
        await app(scope, receive, send_guarded)


_ENCODED = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


def _is_welcome(scope: Scope) -> bool:
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host = headers.get(b"host", "")
    if LOCAL.fullmatch(host) is None:
        return False
    return scope["method"] in ("GET", "HEAD") or headers.get(b"origin") == f"http://{host}"


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


def _page(request: Request, template: str, **values: Any) -> Response:
    site = _site(request)
    token = site.token()
    common = {"path": request.url.path, "may_act": token is not None and _is_signed_in(request, token),
              "can_sign_in": token is not None, "said": request.query_params.get("said", "")}  # fmt: skip
    return HTMLResponse(site.templates.get_template(template).render(**common, **values))


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _page(request, "failure.html", status=error.status_code, reason=error.detail)
    response.status_code = error.status_code
    return response


# -- pages; not async: Starlette runs them in threads, since they read files and the database


def overview(request: Request) -> Response:
    """The pipeline now."""
    site = _site(request)
    with site.database() as connection:
        return _page(request, "overview.html", **pages.overview(site.config(), connection, site.snapshot()))


def model(request: Request) -> Response:
    """One model: what it remembers, its versions, its buffer."""
    site, name = _site(request), request.path_params["model"]
    if name not in site.config().models:
        raise HTTPException(404, f"no model {name}")
    with site.database() as connection:
        return _page(request, "model.html", **pages.model(site.config(), connection, site.snapshot(), name))


def runs(request: Request) -> Response:
    """The runs, newest first."""
    with _site(request).database() as connection:
        return _page(request, "runs.html", **pages.runs_page(connection, request.query_params.get("model")))


def run(request: Request) -> Response:
    """One run with its losses, the verdict and its answers."""
    site = _site(request)
    with site.database() as connection:
        found = pages.run(site.config(), connection, request.path_params["run"])
    if found is None:
        raise HTTPException(404, f"no run {request.path_params['run']}")
    return _page(request, "run.html", **found)


def quarantine(request: Request) -> Response:
    """What was refused, and why."""
    with _site(request).database() as connection:
        return _page(request, "quarantine.html", **pages.quarantine_page(connection))


def log(request: Request) -> Response:
    """The end of the audit log."""
    with _site(request).database() as connection:
        return _page(request, "log.html", **pages.log_page(connection))


def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    from daemon.web import metrics as collected

    site = _site(request)
    with site.database() as connection:
        text = collected.text(site.config(), connection, site.snapshot())
    return Response(text, media_type=collected.CONTENT_TYPE)


async def static(request: Request) -> Response:
    """The style sheet, the script, the icon."""
    name = request.path_params["name"]
    if name not in ("style.css", "page.js", "icon.svg"):
        raise HTTPException(404, f"no file {name}")
    return FileResponse(HERE / "static" / name)


# -- actions


def _session_of(token: str) -> str:
    """The cookie's value: whoever steals it can act here until the token changes, but does not learn the token."""
    return hmac.new(token.encode(), b"eternad session", hashlib.sha256).hexdigest()


def _is_signed_in(request: Request, token: str) -> bool:
    return hmac.compare_digest(request.cookies.get(COOKIE, ""), _session_of(token))


async def _form(request: Request) -> dict[str, str]:
    """The fields of a small urlencoded form."""
    from urllib.parse import parse_qsl

    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            raise HTTPException(413, "that is too long for a form of this page")
    return dict(parse_qsl(body.decode("utf-8", "replace")))


async def sign_in(request: Request) -> Response:
    """Exchange the token for a cookie."""
    token = _site(request).token()
    if token is None:
        raise HTTPException(403, "this page only shows: no [web] token_file is configured")
    if not hmac.compare_digest((await _form(request)).get("token", "").encode(), token.encode()):
        raise HTTPException(403, "that is not the token in [web] token_file")
    response = RedirectResponse("/", 303)
    response.set_cookie(COOKIE, _session_of(token), httponly=True, samesite="strict", path="/", max_age=8 * 3600)
    return response


async def sign_out(_request: Request) -> Response:
    """Forget the cookie."""
    response = RedirectResponse("/", 303)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return response


async def order(request: Request) -> Response:
    """Put an order into the daemon's queue and show its answer."""
    from urllib.parse import urlencode

    from starlette.concurrency import run_in_threadpool

    site = _site(request)
    token = site.token()
    if token is None or not _is_signed_in(request, token):
        raise HTTPException(403, "sign in with the token of [web] token_file first")
    fields = {name: value for name, value in (await _form(request)).items() if value}
    back = fields.pop("back", "/")
    try:
        command = Command(msgspec.convert(fields, Order, strict=False), actor="web")
    except msgspec.ValidationError as error:
        raise HTTPException(400, str(error)) from None
    site.commands.put(command)
    reply = await run_in_threadpool(command.wait, ANSWER_SECONDS)
    target = back if re.fullmatch(r"/[\w/.-]*", back) and not back.startswith("//") else "/"
    return RedirectResponse(f"{target}?{urlencode({'said': reply.text})}", 303)
