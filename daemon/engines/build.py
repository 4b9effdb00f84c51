"""The client of an engine, out of its table in the configuration."""

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from daemon.config import ConfigError
from daemon.config import Engine as Settings
from daemon.engines.channel import Channel
from daemon.engines.contract import Engine
from daemon.engines.directory import Directory
from daemon.engines.embedded import Embedded
from daemon.engines.gateway import BehindGateway, as_it_is, lorax_name, sglang_name
from daemon.engines.llama_server import LlamaServer
from daemon.engines.lorax import Lorax
from daemon.engines.mistral import Mistral
from daemon.engines.routes import RouteTable
from daemon.engines.sglang import Sglang
from daemon.engines.vllm import Vllm

FLEETS = {"vllm": Vllm, "sglang": Sglang}
NAMINGS = {"sglang": sglang_name, "lorax": lorax_name}


def build(settings: Settings, gateway: Path | None = None, owner: str | None = None) -> Engine:
    """`gateway`: its admin socket, when it is the gateway that moves aliases; `owner`: who keeps them there.

    Raises `ConfigError` when the kind needs something that the table does not say. Connects to nothing yet.
    """
    engine = _client(settings)
    if gateway is None or settings.kind == "directory":
        return engine
    admin = Channel(f"unix:{gateway}", None, settings.timeout_seconds)
    urls = [url.partition("?")[0] for url in settings.urls]
    naming = NAMINGS.get(settings.kind, as_it_is)
    return BehindGateway(
        engine, admin, urls, naming=naming, timeout_seconds=settings.timeout_seconds, owner=owner
    )  # fmt: skip


def _client(settings: Settings) -> Engine:
    if not settings.urls:
        raise ConfigError(f'an engine of kind `{settings.kind}` needs `urls`, e.g. ["http://127.0.0.1:8900"]')
    token = settings.token_file.read_text("utf-8").strip() if settings.token_file else None
    url, seconds, slots, routes = settings.urls[0], settings.timeout_seconds, settings.slots, RouteTable()
    if settings.kind in FLEETS:
        return FLEETS[settings.kind](settings.urls, routes, token=token, timeout_seconds=seconds, slots=slots)
    if settings.kind == "lorax":
        return Lorax(url, routes, token=token, timeout_seconds=seconds, slots=slots)
    if settings.kind == "llama_server":
        place = url.partition("?")[0], _preset(url)
        return LlamaServer(*place, routes, token=token, timeout_seconds=seconds, slots=slots)
    if settings.kind == "mistral":
        return Mistral(url, routes, token=token, timeout_seconds=seconds)
    if settings.kind == "directory":
        return Directory(Path(url.removeprefix("file:")), slots)
    return Embedded(url, token=token, timeout_seconds=seconds)


def _preset(url: str) -> Path:
    """`http://host:port?preset=/path/models.ini`."""
    found = parse_qs(urlsplit(url).query).get("preset")
    if not found:
        raise ConfigError(
            f"an engine of kind `llama_server` needs the preset file in its url: {url}?preset=/path/models.ini"
        )
    return Path(found[0])
