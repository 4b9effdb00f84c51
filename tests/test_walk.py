"""The newcomer's walk of docs/systemd.md, followed: every command as it stands there, on a machine that has nothing.

The machine is a systemd of its own (`boot_systemd.sh`) with an empty /etc, /var and /srv. It has no network, so the
lines of "Install" run here before it boots, in a mount namespace where /opt/eternad is the one that it will see.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from machine_kit import BOOT, ROOT, Machine, why_not

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(2400)]
BLOCKS = re.findall(
    r"<!-- walk: (here|in the machine|afterwards)[^>]*-->\n```sh\n(.*?)```",
    (ROOT / "docs" / "systemd.md").read_text(),
    re.DOTALL,
)
NEEDS_NETWORK_OR_OPT = ("git pull", "pip install", "rm -r /opt/eternad")
"""Lines that are not run afterwards: the program is the same and mounted read-only."""
SUDO = '#!/bin/sh\nexec "$@"\n'  # whoever follows is root already
OPT = Path("/opt/eternad")


def lines_of(where: str) -> list[str]:
    """The commands of the blocks that are run there, in their order."""
    return [line for place, block in BLOCKS if place == where for line in block.splitlines()]


def install(home: Path) -> None:
    """Clone and install as the page says, into a directory that is /opt/eternad meanwhile."""
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "sudo").write_text(SUDO)
    (home / "bin" / "sudo").chmod(0o755)
    (home / "opt").mkdir()
    environment = {
        **os.environ, "PATH": f"{home}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME": str(home),
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://example.org/eternad.git",
    }  # fmt: skip
    script = "\n".join([f"mount --bind '{home}/opt' {OPT}", "set -ex", *lines_of("here")])
    was_there = OPT.exists()
    OPT.mkdir(exist_ok=True)
    try:
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script], cwd=home, env=environment,
            capture_output=True, text=True, timeout=1500, check=False,
        )  # fmt: skip
    finally:
        if not was_there:
            OPT.rmdir()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def follow(machine: Machine, command: str, clone: str) -> str:
    """What one command says, run from the clone; raises AssertionError with its output when it fails."""
    whole = [BOOT, "exec", machine.directory, "sh", "-ec", f"cd {clone}\n{command}"]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=900, check=False)
    print(f"$ {command}\n{done.stdout}{done.stderr}", end="")
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def upgrade_and_uninstall(machine: Machine) -> None:
    """The lines of "Upgrade" leave the daemon ready, those of "Uninstall" no unit and all of the state."""
    lines = [line for line in lines_of("afterwards") if not any(word in line for word in NEEDS_NETWORK_OR_OPT)]
    cut = next(number for number, line in enumerate(lines) if "disable --now" in line)
    for line in lines[:cut]:
        follow(machine, line, "/root/eternad")
    machine.wait("READY=1", lambda: machine.show("eternad", "ActiveState") == "active")
    assert "version 1" in machine.eternad("status")
    for line in lines[cut:]:
        follow(machine, line, "/root/eternad")
    assert machine.run("systemctl", "list-unit-files", "--no-legend", "eternad*", check=False) == ""
    assert machine.run("ls", "/var/lib/eternad/versions/npc/0001/manifest.json", "/etc/eternad/eternad.toml")


def test_the_walk_ends_with_a_model_that_has_learned(tmp_path: Path, smollm2: Path) -> None:
    """From `git clone` to a unit that serves version 1 of a model of one's own, and what the last commands then say."""
    if reason := why_not():
        pytest.skip(reason)
    started, home = time.monotonic(), tmp_path / "home"
    install(home)
    installed = time.monotonic()
    shutil.copytree(smollm2, home / "my-model")
    command = [BOOT, "hold", tmp_path / "machine", f"ro:{home}/opt:{OPT}", f"ro:{home}/eternad:/root/eternad"]
    command += [f"ro:{home}/my-model:/root/my-model", f"ro:{home}/bin/sudo:/usr/bin/sudo"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        machine = Machine(tmp_path / "machine")
        said = {command: follow(machine, command, "/root/eternad") for command in lines_of("in the machine")}
        assert machine.show("eternad", "NRestarts") == "0"
        walked = time.monotonic()
        upgrade_and_uninstall(machine)
        holder.stdin.close()
    print(f"the walk took {walked - started:.0f} s, of them {installed - started:.0f} s to install")
    answer, history = (
        "".join(text for command, text in said.items() if word in command) for word in (" ask ", "history")
    )
    assert "LIVE" in history
    assert "npc@0001" in answer
    assert len(said) > 20
