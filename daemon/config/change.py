"""Numbers changed in a configuration file: comments, order and everything else stay as the operator wrote them."""

import difflib
import os
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon.config.check import ConfigError
from daemon.config.file import load

Values = Mapping[str, str | int | float | None]
"""`{"training.epochs": 3, "ewc.strength": 2.0}`; None takes a key out."""


def changed(text: str, model: str, values: Values) -> str:
    """The file's text with the values of `[models.MODEL]` changed; raises `ConfigError` where it cannot be done so."""
    import tomlkit

    document = tomlkit.parse(text)
    _set(document.unwrap(), model, values)  # fails here for what is not in the file
    _set(document, model, values)
    written = tomlkit.dumps(document)
    expected: Any = tomllib.loads(text)
    _set(expected, model, values)
    if tomllib.loads(written) != expected:
        raise ConfigError(
            f"the tables of [models.{model}] stand in an order that cannot be edited; change them by hand"
        )
    return written


def _set(document: Any, model: str, values: Values) -> None:
    table = document["models"][model]
    for name, value in values.items():
        group, _, key = name.partition(".")
        if group in ("training", "lora", "buffer"):
            _put(table.setdefault(group, {}), key, value)
            continue
        entry = next((each for each in table.get("strategy", []) if each["name"] == group), None)
        if entry is None:
            raise ConfigError(f"[models.{model}] has no strategy `{group}` any more; tune again")
        _put(entry, key, value)


def _put(table: Any, key: str, value: str | int | float | None) -> None:
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


def difference(before: str, after: str, name: str) -> str:
    """Unified diff, as `diff -u` prints it."""
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), name, f"{name} (changed)", n=1)
    return "".join(lines)


def replace(path: Path, text: str) -> Path:
    """Write it all or not at all, after the daemon's own check; the old file stays beside it as `.bak`."""
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.tmp")
    backup = path.with_name(path.name + ".bak")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        load(temporary)
        shutil.copy2(path, backup)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return backup
