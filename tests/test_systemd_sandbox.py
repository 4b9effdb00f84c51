"""What the units' programs can see and do, asked from inside their sandboxes."""

import json

import pytest
from machine_kit import CONFIG, Machine, booted, machine

from daemon.machine.units import shipped_directory

__all__ = ["booted", "machine"]  # fixtures

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


GLOO = """
import os, subprocess, sys, time
if len(sys.argv) == 2:
    import torch, torch.distributed as group
    group.init_process_group("gloo", init_method="tcp://127.0.0.1:29500", rank=int(sys.argv[1]), world_size=2)
    total = torch.ones(1)
    group.all_reduce(total)
    time.sleep(3 * (sys.argv[1] == "0"))  # the meeting place goes last: the other may still ask there
    sys.exit(0 if total.item() == 2 else 9)
ranks = [subprocess.Popen([sys.executable, __file__, str(n)], stderr=subprocess.PIPE) for n in range(2)]
end = ranks[0].wait(100)  # it makes the meeting place
if end != 0: ranks[1].kill()
print("<6>met" if (end, ranks[1].wait(100)) == (0, 0) else f"<6>failed: {ranks[0].stderr.read()[-400:]}", flush=True)
"""


def test_gloo_needs_its_drop_in_and_nothing_more(machine: Machine) -> None:
    """Two training processes meet on the loopback of the unit's own network, once the drop-in lets them."""
    gloo = (shipped_directory() / "drop-in-gloo.conf").read_text()
    assert probe(machine, "eternad.service", GLOO, gloo) == "met"
    machine.clean()
    assert "EAFNOSUPPORT" in probe(machine, "eternad.service", GLOO)


def test_the_page_is_reached_through_its_socket(machine: Machine) -> None:
    """The page listens in the daemon's own network; the machine's loopback reaches it, and only by the socket unit."""
    machine.write("/etc/eternad/eternad.toml", CONFIG.format(epochs=2) + '[web]\nlisten = "127.0.0.1:8787"\n')
    machine.drop_in("eternad.service", (shipped_directory() / "drop-in-page.conf").read_text())
    machine.run("systemctl", "start", "eternad.service")
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8787/metrics', timeout=20).read().decode())"
    assert "Connection refused" in machine.run("sh", "-c", f'/opt/eternad/bin/python -c "{ask}" 2>&1', check=False)
    machine.run("systemctl", "start", "eternad-page.socket")
    machine.wait("the page", lambda: "eternad_" in machine.run("/opt/eternad/bin/python", "-c", ask, check=False), 20)
    assert machine.show("eternad-page.service", "ActiveState") == "active"


CONNECT = """
import socket
try:
    with socket.create_connection(("127.0.0.1", 8900), timeout=10) as found:
        print("<6>heard " + found.recv(9).decode(), flush=True)
except OSError as error:
    print(f"<6>{error}", flush=True)
"""


def test_an_engine_on_a_port_needs_the_drop_in_tcp(machine: Machine) -> None:
    """The machine's loopback is out of the unit's reach, and within it once the drop-in lets it."""
    serve = (
        "import socket; s = socket.create_server(('127.0.0.1', 8900))\nwhile True: s.accept()[0].sendall(b'an engine')"
    )
    machine.run("systemd-run", "--unit=eternad-test-engine", "/opt/eternad/bin/python", "-c", serve)
    tcp = (shipped_directory() / "drop-in-tcp.conf").read_text()
    machine.wait("the engine", lambda: "heard" in probe(machine, "eternad.service", CONNECT, tcp), 20)
    machine.run("rm", "/run/systemd/system/eternad.service.d/99-test.conf")
    assert "not supported by protocol" in probe(machine, "eternad.service", CONNECT)


def test_with_the_drop_in_nfs_the_daemon_waits_for_the_mount(machine: Machine) -> None:
    """What is to be mounted at the library's place is mounted before the daemon makes directories there."""
    mount = "[Mount]\nWhat=tmpfs\nWhere=/srv/eternad\nType=tmpfs\nOptions=mode=0777\n"
    machine.write("/run/systemd/system/srv-eternad.mount", mount)
    machine.drop_in("eternad.service", (shipped_directory() / "drop-in-nfs.conf").read_text())
    machine.run("systemctl", "start", "eternad.service")
    assert machine.run("stat", "-f", "-c", "%T", "/srv/eternad/content").strip() == "tmpfs"
    machine.run("systemctl", "stop", "eternad.service", "srv-eternad.mount")
    machine.run("rm", "/run/systemd/system/srv-eternad.mount")


PARSE = """
import os, tempfile
from daemon.config import Watch
from daemon.ingest.sandbox import Task
from daemon.parse import in_unit
import msgspec
with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as answer:
    file.write(b"prompt,completion\\nWho reads?,The Library reads.\\n")
    file.flush()
    task = msgspec.json.encode(Task("csv", Watch())).decode()
    broken = in_unit(file.fileno(), task, answer.fileno(), seconds=30)
    answer.seek(0)
    print("<6>" + (broken or answer.read().decode().replace("\\n", " ")), flush=True)
"""


def test_a_hostile_file_is_parsed_in_a_unit_of_its_own(machine: Machine) -> None:
    """The daemon, from inside its sandbox, has a file parsed by a process that has nothing but that file."""
    machine.run("systemctl", "start", "eternad-parse.socket")
    said = probe(machine, "eternad.service", PARSE)
    assert "The Library reads." in said
    assert '"type":"done"' in said
    assert "eternad-parse" not in machine.run("systemctl", "list-units", "--failed", "--no-legend")
