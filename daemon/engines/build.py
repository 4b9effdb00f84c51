"""The client of an engine, out of its table in the configuration."""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from daemon.config import ConfigError
from daemon.config import Engine as Settings
from daemon.engines.channel import Channel
from daemon.engines.contract import Engine
from daemon.engines.directory import Directory
from daemon.engines.embedded import Embedded
from daemon.engines.gateway import BehindGateway, as_it_is, llama_name, lorax_name, sglang_name
from daemon.engines.llama_scales import LlamaScales
from daemon.engines.llama_server import LlamaServer
from daemon.engines.lorax import Lorax
from daemon.engines.mistral import Mistral
from daemon.engines.routes import RouteTable
from daemon.engines.sglang import Sglang
from daemon.engines.vllm import Vllm
from daemon.engines.vllm_shaped import VllmShaped

FLEETS = {"vllm": Vllm, "vllm_shaped": VllmShaped, "sglang": Sglang}
NAMINGS = {"sglang": sglang_name, "lorax": lorax_name, "llama_server": llama_name}


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
        return _llama(url, routes, token=token, timeout_seconds=seconds, slots=slots)
    if settings.kind == "mistral":
        return Mistral(url, routes, token=token, timeout_seconds=seconds)
    if settings.kind == "directory":
        return Directory(Path(url.removeprefix("file:")), slots)
    return Embedded(url, token=token, timeout_seconds=seconds)


def _llama(url: str, routes: RouteTable, **options: Any) -> Engine:
    """`URL?preset=/path/models.ini`: a router; `URL?slots=/path/slots&base=/path/base.gguf`: one process with slots."""
    address, _, query = url.partition("?")
    found = {key: Path(values[0]) for key, values in parse_qs(query).items()}
    if "preset" in found:
        return LlamaServer(address, found["preset"], routes, **options)
    if "slots" in found and "base" in found:
        return LlamaScales(address, found["slots"], found["base"], routes, **options)
    raise ConfigError(
        f"an engine of kind `llama_server` needs its files in its url: {address}?preset=/path/models.ini for a router,"
        f" {address}?slots=/path/slots&base=/path/base.gguf for one process with slots"
    )
