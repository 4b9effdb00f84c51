"""The machine of the systemd tests leaves nothing behind, whoever is killed."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from machine_kit import BOOT, Machine, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


def boot(directory: Path) -> subprocess.Popen[str]:
    """A machine at `directory`, held by the process that is returned."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([BOOT, "hold", directory], text=True, start_new_session=True, **pipes)
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    return holder


def cgroup_of(holder: subprocess.Popen[str]) -> Path:
    """The one directory outside the namespaces and the temporary directory."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    root = next(Path(fields[1]) for fields in mounts if fields[2] == "cgroup2")
    return root / f"eternad-boot-{holder.pid}"


def await_end(directory: Path, cgroup: Path, leader: int) -> None:
    """Until directory, cgroup, and the machine's PID 1 are gone; no mount of it is left here."""
    deadline = time.monotonic() + 30
    while directory.exists() or cgroup.exists() or Path(f"/proc/{leader}").exists():
        assert time.monotonic() < deadline, (directory.exists(), cgroup.exists(), leader)
        time.sleep(0.1)
    assert str(directory) not in Path("/proc/mounts").read_text()


def end_of_input(holder: subprocess.Popen[str]) -> None:
    """What happens when the test run ends or is killed: the pipe closes."""
    assert holder.stdin is not None
    holder.stdin.close()


def kill_the_holder(holder: subprocess.Popen[str]) -> None:
    """The worst for the harness itself."""
    os.kill(holder.pid, signal.SIGKILL)


@pytest.mark.parametrize("end", [end_of_input, kill_the_holder])
def test_nothing_stays_behind(end: Callable[[subprocess.Popen[str]], None], tmp_path: Path) -> None:
    """After an orderly end and after a SIGKILL: no process, no mount, no cgroup, no directory."""
    directory = tmp_path / "machine"
    with boot(directory) as holder:
        leader, cgroup = int((directory / "leader").read_text()), cgroup_of(holder)
        assert cgroup.exists()
        assert Machine(directory).run("systemctl", "is-system-running").strip() == "running"
        end(holder)
        await_end(directory, cgroup, leader)


def test_leftovers_of_a_killed_guard_are_swept(tmp_path: Path) -> None:
    """When holder and guard die at once the machine dies too; its empty cgroup stays until the next one is booted."""
    directory = tmp_path / "machine"
    with boot(directory) as holder:
        leader, cgroup = int((directory / "leader").read_text()), cgroup_of(holder)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        guard = next(int(pid) for pid in children if b"__guard" in Path(f"/proc/{pid}/cmdline").read_bytes())
        for pid in (guard, holder.pid):
            os.kill(pid, signal.SIGKILL)
    assert cgroup.exists()
    with boot(tmp_path / "next") as holder:
        shutil.rmtree(directory)  # the test run's own temporary directory
        await_end(directory, cgroup, leader)
        end_of_input(holder)
