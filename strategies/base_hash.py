"""Which base model an adapter belongs to: one hash over weights, configuration and tokenizer."""

import hashlib
import json
from pathlib import Path

from strategies.request import write

PARTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
CACHE_FILE = "base-sha256.json"


def base_sha256(base: Path, cache_directory: Path | None = None) -> str:
    """SHA-256 (hex) over names and contents of a base model's files.

    Hashes of files are kept in `cache_directory` by path, size and modification time (an 8B model: 16 GB, 15 s).
    """
    cache = _read_cache(cache_directory)
    whole = hashlib.sha256()
    fresh: dict[str, str] = {}
    for path in sorted({path for part in PARTS for path in base.glob(part)}):
        status = path.stat()
        key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        fresh[key] = cache.get(key) or _file_sha256(path)
        whole.update(f"{path.name}\0{fresh[key]}\n".encode())
    if cache_directory is not None and not fresh.items() <= cache.items():
        cache_directory.mkdir(parents=True, exist_ok=True)
        write(cache_directory / CACHE_FILE, {**cache, **fresh})
    return whole.hexdigest()


def _read_cache(directory: Path | None) -> dict[str, str]:
    try:
        return dict(json.loads((directory / CACHE_FILE).read_bytes())) if directory else {}
    except (OSError, ValueError):
        return {}  # a cache may be lost at any time


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
