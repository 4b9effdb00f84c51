"""The client of an engine, out of its table in the configuration."""

from pathlib import Path

from daemon.config import ConfigError
from daemon.config import Engine as Settings
from daemon.engines.contract import Engine
from daemon.engines.embedded import Embedded


def build(settings: Settings) -> Engine:
    """Raises `ConfigError` when the kind needs something that the table does not say. Connects to nothing yet."""
    if not settings.urls:
        raise ConfigError(f'an engine of kind `{settings.kind}` needs `urls`, e.g. ["http://127.0.0.1:8900"]')
    token = settings.token_file.read_text("utf-8").strip() if settings.token_file else None
    url = settings.urls[0]
    if url.startswith("unix:"):
        return Embedded("http://engine", uds=Path(url.removeprefix("unix:")), token=token)
    return Embedded(url, token=token)
