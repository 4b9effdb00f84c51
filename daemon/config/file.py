"""Reads the configuration file.

A key that does not exist is an error that names the nearest one. Relative paths are relative to the file's directory.
"""

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from buffers.policy import Buffer
from daemon.config.check import ConfigError, check
from daemon.config.tables import Config, Engine, Gate, Gateway, Intake, Model, Schedule, Watch, Web
from daemon.notify.settings import Notify
from daemon.rollout import Rollout
from daemon.trust.metric import Metric
from daemon.trust.policy import Source, Trust
from daemon.tuning.rules import Tuning
from strategies.catalog import BY_NAME
from strategies.parallel.choice import Parallel
from strategies.request import Lora, Training

CREDENTIAL, UNIT_CREDENTIALS = "credential:", "/run/credentials/eternad.service"


def load(path: Path) -> Config:
    """Read and check a configuration file; raises `ConfigError` with what, where and what to do."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Write a first one with: eternad init {path}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        config = msgspec.convert(tree, Config, strict=True, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {explain(str(error))}") from None
    config = _absolute(config, path.parent.absolute())
    check(config, path)
    return config


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and value.startswith(CREDENTIAL):
        directory = Path(os.environ.get("CREDENTIALS_DIRECTORY", UNIT_CREDENTIALS))
        return directory / f"eternad_{value.removeprefix(CREDENTIAL)}"
    if kind is Path:
        return Path(value).expanduser()
    raise TypeError(f"no {kind} in a configuration")


def fields_of(kind: type) -> list[str]:
    """The key names of one table of the configuration."""
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def explain(message: str) -> str:
    """msgspec's message with the table's name and, for an unknown key, the nearest one that exists."""
    found = re.search(r"unknown field `(.*?)`(?: - at `\$(.*)`)?", message)
    if found is None:
        return re.sub(r" - at `\$\.?(.*?)`", r" (at: \1)", message)
    key, place = found.group(1), (found.group(2) or "").lstrip(".")
    known = fields_of(_table(place))
    nearest = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else "known keys: " + ", ".join(known)
    return f"unknown key `{key}` in [{place or 'top level'}]; {hint}"


_TABLES: list[tuple[str, type]] = [
    (r"", Config), (r"watch", Watch), (r"trust", Trust), (r"web", Web), (r"intake", Intake), (r"gateway", Gateway),
    (r"trust\.sources.*", Source), (r"metrics.*", Metric), (r"engines.*", Engine), (r".*\.lora", Lora),
    (r".*\.tuning", Tuning), (r".*\.parallel", Parallel),
    (r"notify", Notify),
    (r".*\.training", Training), (r".*\.buffer", Buffer), (r".*\.schedule", Schedule), (r".*\.gate", Gate),
    (r".*\.rollout", Rollout), (r".*\.strategy.*", msgspec.Struct), (r"models.*", Model),
]  # fmt: skip


def _table(place: str) -> type:
    kind = next(kind for pattern, kind in _TABLES if re.fullmatch(pattern, place))
    if kind is not msgspec.Struct:
        return kind
    every = {name for strategy in BY_NAME.values() for name in fields_of(strategy)}
    return msgspec.defstruct("AnyStrategy", [(name, Any) for name in sorted(every)])


def _absolute(config: Config, directory: Path) -> Config:
    """Relative paths are relative to the configuration file, wherever the daemon was started."""

    def at(path: Path | None) -> Path | None:
        return None if path is None else directory / path

    replace = msgspec.structs.replace
    return replace(
        config,
        library_directory=directory / config.library_directory,
        state_directory=directory / config.state_directory,
        gpu_lock_file=at(config.gpu_lock_file),
        trust=replace(config.trust, blocklist_file=at(config.trust.blocklist_file)),
        web=replace(config.web, token_file=at(config.web.token_file)),
        intake=replace(config.intake, socket=at(config.intake.socket), token_file=at(config.intake.token_file)),
        notify=replace(
            config.notify,
            webhook_secret_file=at(config.notify.webhook_secret_file),
            apprise_file=at(config.notify.apprise_file),
        ),
        gateway=replace(
            config.gateway,
            admin_socket=at(config.gateway.admin_socket),
            table_file=at(config.gateway.table_file),
            token_file=at(config.gateway.token_file),
        ),
        models={
            name: replace(model, base_path=directory / model.base_path, general_directory=at(model.general_directory))
            for name, model in config.models.items()
        },
        engines={name: replace(engine, token_file=at(engine.token_file)) for name, engine in config.engines.items()},
    )
