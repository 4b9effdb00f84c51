"""What the tests of faults share: a service over one state directory, and a small disk that can be filled."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from service_kit import MemoryEngine, make_config, use_trainer

from daemon.service import Service, serving
from daemon.state import runs


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


class Make:
    """Opens a service; again with the same state is a restart of the daemon."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened: Service | None = None

    def __call__(
        self, state: Path | None = None, /, changes: dict[str, Any] | None = None, **model: Any
    ) -> Service:  # fmt: skip
        self.close()
        config = make_config(self._directory, **model)
        wanted = {"state_directory": state or config.state_directory, **(changes or {})}
        self._opened = Service(msgspec.structs.replace(config, **wanted), self._directory / "eternad.toml")
        return self._opened

    def close(self) -> None:
        """As SIGTERM does."""
        service, self._opened = self._opened, None
        if service is not None:
            service.close()


@pytest.fixture(name="make")
def make_fixture(tmp_path: Path, lab: Path, engine: MemoryEngine) -> Iterator[Make]:
    """Closed in the end."""
    make = Make(tmp_path)
    yield make
    make.close()


@pytest.fixture(name="small_disk")
def small_disk_fixture(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB and 1,000 files in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=1000", "tmpfs", str(place)]
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
