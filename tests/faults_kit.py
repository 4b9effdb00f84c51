"""What the tests of faults share: a service over one state directory, and a small disk that can be filled."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from service_kit import MemoryEngine, make_config, use_trainer

from daemon.config import Config
from daemon.service import Service, serving
from daemon.state import runs

Make = Callable[..., Service]


@pytest.fixture(name="engine")
def engine_fixture(monkeypatch: pytest.MonkeyPatch) -> MemoryEngine:
    """An engine in memory."""
    memory = MemoryEngine()
    monkeypatch.setattr(serving, "build", lambda *settings: memory)
    return memory


@pytest.fixture(name="lab")
def lab_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the scripted trainer takes its orders from."""
    use_trainer(tmp_path / "lab", monkeypatch)
    return tmp_path / "lab"


@pytest.fixture(name="make")
def make_fixture(tmp_path: Path, lab: Path, engine: MemoryEngine) -> Iterator[Make]:
    """Opens a service; again with the same state is a restart of the daemon."""
    opened: list[Service] = []

    def close() -> None:
        for service in opened:
            service.close()
        opened.clear()

    def start(state: Path | None = None, /, changes: dict[str, Any] | None = None, **model: Any) -> Service:
        close()
        config: Config = make_config(tmp_path, **model)
        wanted = {"state_directory": state or config.state_directory, **(changes or {})}
        service = Service(msgspec.structs.replace(config, **wanted), tmp_path / "eternad.toml")
        opened.append(service)
        return service

    yield start
    close()


@pytest.fixture(name="small_disk")
def small_disk_fixture(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root and CAP_SYS_ADMIN")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, left: int = 0) -> Path:
    """Leave only `left` bytes free; returns the file whose removal makes room again."""
    filler = place / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(place).free - left)
    return filler


def state_of(service: Service) -> str:
    """Of the latest run; empty before the first one."""
    latest = runs.recent(service.house.database, "npc", 1)
    return latest[0].state if latest else ""
