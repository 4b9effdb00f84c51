"""A machine with a real systemd for the tests of a module (tests/boot_systemd.sh), eternad's units installed in it.

The machine sees the interpreter of the system (units cannot see those below home directories) with the libraries of
the environment that runs the tests, the packages of this checkout, and a tiny base model.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.machine.units import NEXT_STEPS

ROOT = Path(__file__).resolve().parent.parent
BOOT = ROOT / "tests" / "boot_systemd.sh"
PYTHON = Path("/usr/bin/python3")
SYSTEMD = Path("/usr/lib/systemd/systemd")
PACKAGES = ("daemon", "strategies", "buffers", "serving", "systemd")
CONFIG = """
library_directory = "/srv/eternad"
state_directory = "/var/lib/eternad"
tick_seconds = 0.1
[watch]
stability_seconds = 0.2
scan_seconds = 1.0
heldout_fraction = 0.2
[models.npc]
base_path = "/srv/base"
engine = "npc"
lora = {{ rank = 4 }}
training = {{ epochs = {epochs}, early_stop_patience = 0, learning_rate = 1e-2 }}
schedule = {{ threshold_examples = 8, quiet_seconds = 0.5 }}
[models.npc.gate]
old_loss_max = 10.0
eval_loss_max = 10.0
drift_base_max = 100.0
drift_previous_max = 100.0
general_loss_max = 100.0
new_gain_min = -10.0
[engines.npc]
urls = ["unix:/run/eternad-engines/npc/engine.sock"]
reconcile_seconds = 0.5
"""


def why_not() -> str:
    """What this machine lacks to boot a systemd; empty if nothing."""
    if os.geteuid() != 0:
        return "booting a systemd needs root"
    if not SYSTEMD.exists():
        return "no systemd on this machine (Debian: apt-get install systemd dbus libnss-systemd)"
    if not any(line.split()[2] == "cgroup2" for line in Path("/proc/mounts").read_text().splitlines()):
        return "no cgroup2 file system is mounted"
    if shutil.which("nsenter") is None:
        return "no nsenter on this machine (Debian: apt-get install util-linux)"
    version = subprocess.check_output([PYTHON, "-c", "import sys; print(sys.version_info[:2])"], text=True)
    if version.strip() != str(sys.version_info[:2]):
        return f"{PYTHON} is not the Python {sys.version_info[:2]} whose libraries are installed"
    return ""


class Machine:
    """The booted systemd."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self, *command: str, check: bool = True, text: str = "") -> str:
        """Standard output of a command inside, as root; raises AssertionError when it fails."""
        whole = [BOOT, "exec", self.directory, *command]
        done = subprocess.run(whole, input=text, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "-P", name, unit).strip()

    def write(self, path: str, text: str, mode: str = "0644") -> None:
        """A file inside, owned by root."""
        self.run("install", "-D", "-m", mode, "/dev/stdin", path, text=text)

    def drop_in(self, unit: str, text: str) -> None:
        """Change a unit until `clean`."""
        self.write(f"/run/systemd/system/{unit}.d/99-test.conf", text)
        self.run("systemctl", "daemon-reload")

    def clean(self) -> None:
        """Stop everything; units, configuration and state are as after an install."""
        self.run(
            "sh", "-c", "systemctl stop 'eternad*'; rm -rf /run/systemd/system/eternad* /var/lib/eternad /srv/eternad"
        )
        self.run("sh", "-c", "systemctl daemon-reload; systemctl reset-failed; systemd-tmpfiles --create eternad.conf")
        self.write("/etc/eternad/eternad.toml", CONFIG.format(epochs=2))

    def eternad(self, *command: str, check: bool = True) -> str:
        """What the program says to a command."""
        return self.run("/opt/eternad/bin/eternad", "--config", "/etc/eternad/eternad.toml", *command, check=check)

    def journal(self, unit: str) -> list[dict[str, Any]]:
        """The messages of a unit, oldest first."""
        self.run("journalctl", "--sync")
        return [json.loads(line) for line in self.run("journalctl", "-o", "json", "-u", unit).splitlines()]

    def messages(self, unit: str) -> str:
        """The texts of a unit's messages."""
        return "\n".join(str(entry.get("MESSAGE")) for entry in self.journal(unit))

    def wait(self, what: str, is_true: Callable[[], bool], seconds: float = 60) -> None:
        """Until `is_true()`; raises AssertionError with the journal."""
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, f"{what} has not happened\n{self.run('journalctl', '-n', '60')}"
            time.sleep(0.2)


def make_environment(directory: Path) -> Path:
    """An environment as a wheel's install makes it, except that libraries and packages come from elsewhere."""
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", directory], check=True)
    (directory / "lib" / f"python3.{sys.version_info[1]}" / "site-packages" / "checkout.pth").write_text(
        "/opt/checkout\n/opt/libraries\n"
    )
    script = directory / "bin" / "eternad"
    script.write_text("#!/opt/eternad/bin/python\nimport sys\nfrom daemon.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Machine]:
    """A machine with the tiny base model in `/srv/base`."""
    yield from boot(tmp_path_factory.mktemp("boot"), tiny_base)


def boot(directory: Path, base_model: Path) -> Iterator[Machine]:
    """A machine on which the documented install has been done; it goes away with the test run, however that ends."""
    if reason := why_not():
        pytest.skip(reason)
    environment = make_environment(directory / "environment")
    binds = [f"ro:{environment}:/opt/eternad", f"ro:{sysconfig.get_path('purelib')}:/opt/libraries"]
    binds += [f"ro:{ROOT / name}:/opt/checkout/{name}" for name in PACKAGES]
    base = shutil.copytree(base_model, directory / "base")
    (base / "model.safetensors").chmod(0o644)  # written for its owner alone
    binds += [f"ro:{base}:/srv/base"]
    holder = subprocess.Popen(
        [BOOT, "hold", directory / "machine", *binds], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "ready\n"
        machine = Machine(directory / "machine")
        machine.run("/opt/eternad/bin/eternad", "install-units")
        for step in NEXT_STEPS:
            machine.run(*step.split())
        machine.write("/etc/eternad/credentials/page-token", "s3cret", "0600")
        yield machine
        holder.stdin.close()


@pytest.fixture
def machine(booted: Machine) -> Machine:
    """The machine with nothing of eternad running, and a fresh state."""
    booted.clean()
    return booted
