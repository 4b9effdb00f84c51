"""A file system that turns read-only under the running daemon: one that comes back, one that has to be mended.

The daemon, its database and its open descriptors are real processes and files; the engine is one in memory.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from kill_kit import HERE, Child, consumed, scripted, wait, write_drop
from service_kit import prepare_lab
from test_kill import CONFIG, start_for_good


def can_mount_fuse() -> bool:
    return os.geteuid() == 0 and Path("/dev/fuse").exists() and importlib.util.find_spec("mfusepy") is not None


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory for a daemon with its page, whose state lies on `disk/`."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    page = f'[web]\nlisten = "127.0.0.1:{(tmp_path / "port").read_text()}"\n'
    (tmp_path / "eternad.toml").write_text(CONFIG.replace('"state"', '"disk/state"') + page)
    prepare_lab(tmp_path / "lab")
    (tmp_path / "disk").mkdir()
    (tmp_path / "state").symlink_to("disk/state", target_is_directory=True)  # where the kill kit looks
    return tmp_path


@pytest.fixture
def switch(place: Path) -> Iterator[Path]:
    """`disk/` is a file system that is read-only while this file exists."""
    library = any(shutil.which(name) for name in ("fusermount3", "fusermount"))
    if not can_mount_fuse() or not library:
        pytest.skip("needs root, /dev/fuse, libfuse (Debian: apt-get install fuse3) and mfusepy")
    (place / "behind").mkdir()
    command = [sys.executable, str(HERE / "mirror_file_system.py"), *(str(place / n) for n in ("behind", "disk", "ro"))]
    with (place / "mirror.log").open("wb") as log:
        mirror = subprocess.Popen(command, stdout=log, stderr=log)
    wait((place / "disk").is_mount, 20, "the file system is mounted", place / "mirror.log")
    yield place / "ro"
    subprocess.run(["umount", "--lazy", str(place / "disk")], check=True)
    mirror.wait(20)


def metrics(place: Path) -> dict[str, float]:
    """What the page of the running daemon measures, without labels."""
    address = f"http://127.0.0.1:{(place / 'port').read_text()}/metrics"
    with urllib.request.urlopen(address, timeout=20) as answer:
        lines = [line.decode().rsplit(" ", 1) for line in answer if not line.startswith(b"#")]
    return {name.split("{")[0]: float(value) for name, value in lines}


def said_by_status(place: Path) -> str:
    command = [sys.executable, "-m", "daemon", "status", "--config", str(place / "eternad.toml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def learn_the_first_drop(place: Path) -> Child:
    """A daemon that serves version 1."""
    daemon = scripted(place)
    start_for_good(daemon, place)
    write_drop(place, "a.jsonl", range(10))
    wait(lambda: consumed(place) == 9, 30, "the first drop is learned", place / "daemon.log")
    wait(lambda: metrics(place).get("eternad_serving_version") == 1, 20, "version 1 serves", place / "daemon.log")
    return daemon


def check_that_it_is_read_only(place: Path) -> None:
    """The next drop cannot be taken in; status says why and what to do, the page lives, version 1 serves."""
    write_drop(place, "b.jsonl", range(100, 110))
    wait(lambda: metrics(place)["eternad_turn_failures_total"] >= 2, 30, "turns fail", place / "daemon.log")
    assert "the file system is read-only: mount it writable" in said_by_status(place)
    measured = metrics(place)
    assert (measured["eternad_up"], measured["eternad_serving_version"], measured["eternad_in_sync"]) == (1, 1, 1)
    assert consumed(place) == 9


def test_a_file_system_that_is_read_only_for_a_while_needs_no_restart(place: Path, switch: Path) -> None:
    """Also through descriptors that are open, the kernel refuses every write; writable again, all goes on by itself."""
    daemon = learn_the_first_drop(place)
    try:
        switch.touch()
        check_that_it_is_read_only(place)
        switch.unlink()
        wait(lambda: consumed(place) == 18, 60, "the second drop is learned", place / "daemon.log")
        assert metrics(place)["eternad_serving_version"] == 2
        assert daemon.starts == 1
    finally:
        assert daemon.stop() == 0
    assert "Traceback" not in (place / "daemon.log").read_text()


@pytest.fixture
def ext4(place: Path) -> list[str]:
    """`disk/` is an ext4 of its own that the kernel turns read-only at an error; the command that mounts it."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and e2fsprogs")
    image = place / "ext4.image"
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    command = ["mount", "-o", "loop,errors=remount-ro", str(image), str(place / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    return command


def test_after_an_error_of_ext4_the_daemon_says_so_until_it_is_mended(place: Path, ext4: list[str]) -> None:
    """The kernel lets nobody mount such a one writable: the daemon ends when told to, and after the check goes on."""
    daemon = learn_the_first_drop(place)
    try:
        subprocess.run(["mount", "-o", "remount,abort", str(place / "disk")], check=False)  # as at an error of the disk
        check_that_it_is_read_only(place)
        daemon.stop()
        subprocess.run(["umount", str(place / "disk")], check=True)
        assert subprocess.run(["e2fsck", "-p", ext4[-2]], check=False, capture_output=True).returncode in (0, 1)
        subprocess.run(ext4, check=True)
        start_for_good(daemon, place)
        wait(lambda: consumed(place) == 18, 60, "the second drop is learned", place / "daemon.log")
        assert daemon.stop() == 0
    finally:
        daemon.kill()
        subprocess.run(["umount", "--lazy", str(place / "disk")], check=True)
