"""The installed units in a real systemd: one boot for all tests (tests/boot_systemd.sh), the real program inside.

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

from daemon.units import NEXT_STEPS

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
gate = {{ old_loss_max = 10.0, eval_loss_max = 10.0, drift_base_max = 100.0, new_gain_min = -10.0 }}
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
        self.run("sh", "-c", "systemctl stop 'eternad*'; rm -rf /run/systemd/system/eternad* /var/lib/eternad /srv/eternad")
        self.run("sh", "-c", "systemctl daemon-reload; systemctl reset-failed; systemd-tmpfiles --create eternad.conf")
        self.write("/etc/eternad/eternad.toml", CONFIG.format(epochs=2))

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
    """A machine on which the documented install has been done; it goes away with the test run, however that ends."""
    if reason := why_not():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("boot")
    environment = make_environment(directory / "environment")
    binds = [f"ro:{environment}:/opt/eternad", f"ro:{sysconfig.get_path('purelib')}:/opt/libraries"]
    binds += [f"ro:{ROOT / name}:/opt/checkout/{name}" for name in PACKAGES] + [f"ro:{tiny_base}:/srv/base"]
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


def drop_content(machine: Machine) -> None:
    """A writer's file with enough examples for an update."""
    rows = "".join(f'{{"prompt": "Question {n}?", "completion": "Answer {n} of the Library."}}\n' for n in range(24))
    machine.write("/srv/eternad/content/npc/lore.jsonl", rows)


def test_starts_to_ready(machine: Machine) -> None:
    """`systemctl start` returns when the daemon watches; directories and socket are the group's, not the world's."""
    machine.run("systemctl", "start", "eternad")
    assert machine.show("eternad", "ActiveState") == "active"
    assert machine.show("eternad", "StatusText") != ""
    paths = ["/var/lib/eternad", "/run/eternad", "/run/eternad/control.sock", "/var/cache/eternad"]
    assert machine.run("stat", "-c", "%U:%G %a", *paths).split("\n")[:4] == [
        "eternad:eternad 750", "eternad:eternad 750", "eternad:eternad 660", "eternad:eternad 750",
    ]  # fmt: skip
    ready = next(entry for entry in machine.journal("eternad") if "ready" in str(entry.get("MESSAGE")))
    assert (ready["PRIORITY"], ready["SYSLOG_IDENTIFIER"]) == ("6", "eternad")
    assert "npc" in machine.run("/opt/eternad/bin/eternad", "--config", "/etc/eternad/eternad.toml", "status")


def test_reload_takes_a_good_configuration_and_refuses_a_bad_one(machine: Machine) -> None:
    """SIGHUP: the same process goes on, with the new configuration or, if that is broken, with the old one."""
    machine.run("systemctl", "start", "eternad")
    pid = machine.show("eternad", "MainPID")
    for epochs, said in (("3", "configuration taken"), ("-3", "the configuration stays as it was")):
        machine.write("/etc/eternad/eternad.toml", CONFIG.format(epochs=epochs))
        machine.run("systemctl", "reload", "eternad")
        machine.wait(said, lambda said=said: said in machine.messages("eternad"), 20)  # type: ignore[misc]
        machine.wait("READY=1", lambda: machine.show("eternad", "SubState") == "running", 20)
    assert machine.show("eternad", "MainPID") == pid
    assert machine.show("eternad", "NRestarts") == "0"


def test_a_crash_is_followed_by_a_restart(machine: Machine) -> None:
    """After a SIGKILL the daemon is ready again within 10 seconds, without a hand."""
    machine.run("systemctl", "start", "eternad")
    pid = machine.show("eternad", "MainPID")
    machine.run("kill", "-KILL", pid)
    machine.wait("the restart", lambda: machine.show("eternad", "NRestarts") == "1", 20)
    machine.wait("READY=1", lambda: machine.show("eternad", "ActiveState") == "active", 20)
    assert machine.show("eternad", "MainPID") != pid


def test_a_hung_daemon_is_killed_by_the_watchdog(machine: Machine) -> None:
    """A daemon whose loop stands still is aborted, leaves its stack in the journal, and is started again."""
    machine.drop_in("eternad.service", "[Service]\nWatchdogSec=5s\nTimeoutAbortSec=3s\n")
    machine.run("systemctl", "start", "eternad")
    pid = machine.show("eternad", "MainPID")
    time.sleep(6)  # longer than the watchdog: a loop that works is left alone
    assert machine.show("eternad", "MainPID") == pid
    machine.run("kill", "-STOP", pid)
    machine.wait("the restart", lambda: machine.show("eternad", "NRestarts") == "1", 30)
    said = machine.messages("eternad")
    assert "Watchdog timeout" in said
    assert "Fatal Python error: Aborted" in said
    machine.wait("READY=1", lambda: machine.show("eternad", "ActiveState") == "active", 20)


def test_a_bad_configuration_is_no_restart_loop(machine: Machine) -> None:
    """Exit code 78: the unit fails at once and stays so, the journal says why, and the failure is reported."""
    machine.write("/etc/eternad/on-failure", '#!/bin/sh\necho "paged about $1"\n', "0755")
    machine.write("/etc/eternad/eternad.toml", CONFIG.format(epochs="-3"))
    machine.run("systemctl", "start", "eternad", check=False)
    time.sleep(4)  # twice RestartSec
    names = ("ActiveState", "ExecMainStatus", "NRestarts")
    assert [machine.show("eternad", name) for name in names] == ["failed", "78", "0"]
    assert "/etc/eternad/eternad.toml" in machine.messages("eternad")
    report = machine.journal("eternad-failure@eternad.service.service")
    machine.run("rm", "/etc/eternad/on-failure")
    assert any("eternad.service has failed for good" in str(e["MESSAGE"]) and e["PRIORITY"] == "2" for e in report)
    assert any("paged about eternad.service" in str(e["MESSAGE"]) for e in report)


PROBE = """
import ctypes, json, os, pathlib, socket, sys
def can(act):
    try: act(); return "yes"
    except OSError as error: return os.strerror(error.errno)
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), "")
write = lambda place: lambda: (pathlib.Path(place) / ".probe").write_text("x")
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
credentials = os.environ.get("CREDENTIALS_DIRECTORY")
print("<6>" + json.dumps({
    "user": os.getuid(), "capabilities": [status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")],
    "no_new_privs": status["NoNewPrivs"].strip(), "seccomp": status["Seccomp"].strip(),
    "write": {place: can(write(place)) for place in sys.argv[1:]},
    "list": {place: can(lambda: os.listdir(place)) for place in sys.argv[1:]},
    "inet": can(lambda: socket.socket(socket.AF_INET)), "netlink": can(lambda: socket.socket(socket.AF_NETLINK, 3)),
    "packet": can(lambda: socket.socket(socket.AF_PACKET, 3)), "interfaces": sorted(os.listdir("/sys/class/net")),
    "network": os.readlink("/proc/self/ns/net"), "devices": sorted(os.listdir("/dev")),
    "unshare": can(lambda: call(272, 0x10000000)), "mount": can(lambda: call(165, b"x", b"/tmp", b"tmpfs", 0, 0)),
    "set_uid_bit": can(lambda: (write("/tmp")(), os.chmod("/tmp/.probe", 0o4755))),
    "credentials": {p.name: p.read_text() for p in pathlib.Path(credentials).iterdir()} if credentials else {},
    "others": sum(name.isdigit() and os.stat(f"/proc/{name}").st_uid != os.getuid() for name in os.listdir("/proc")),
}))
"""
PLACES = ("/etc", "/usr", "/opt/eternad", "/var/lib/eternad", "/srv/eternad", "/tmp", "/root", "/home", "/etc/eternad")


def probe(machine: Machine, unit: str, program: str = PROBE, drop_in: str = "") -> str:
    """What a program in the place of a unit's own, inside the unit's sandbox, printed last."""
    machine.write("/srv/probe.py", program)
    start = f"ExecStartPost=\nExecStart=\nExecStart=/opt/eternad/bin/python /srv/probe.py {' '.join(PLACES)}\n"
    machine.drop_in(unit, f"[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\n{start}{drop_in}")
    machine.run("systemctl", "start", unit, check=False)
    return next(str(e["MESSAGE"]) for e in reversed(machine.journal(unit)) if e.get("_TRANSPORT") == "stdout")


@pytest.mark.parametrize(
    ("unit", "writable", "unseen"),
    [
        ("eternad.service", {"/var/lib/eternad", "/srv/eternad", "/tmp"}, {"/root", "/home"}),
        ("eternad-engine@npc.service", {"/tmp"}, {"/root", "/home", "/srv/eternad"}),
        ("eternad-gateway.service", {"/tmp"}, {"/root", "/home", "/srv/eternad"}),
    ],
)
def test_sandbox(unit: str, writable: set[str], unseen: set[str], machine: Machine) -> None:
    """Inside: nothing writable but its own directories, no capability, no network, no way to get more."""
    seen = json.loads(probe(machine, unit))
    assert {place for place, answer in seen["write"].items() if answer == "yes"} == writable
    assert {place for place, answer in seen["list"].items() if answer != "yes"} == unseen
    assert seen["user"] != 0
    assert set(seen["capabilities"]) == {"0000000000000000"}
    assert (seen["no_new_privs"], seen["seccomp"], seen["others"]) == ("1", "2", 0)
    assert "yes" not in {seen[what] for what in ("inet", "netlink", "packet", "unshare", "mount", "set_uid_bit")}
    assert seen["network"] != machine.run("readlink", "/proc/self/ns/net").strip()
    assert not {name for name in seen["devices"] if name.startswith(("nvidia", "dri", "kfd", "vd", "sd", "kvm"))}
    assert seen["credentials"] == ({"eternad_page-token": "s3cret"} if unit == "eternad.service" else {})
