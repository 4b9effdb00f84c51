"""The units' lives in a real systemd: start, reload, update, stop in mid-training, crash, hang, bad configuration."""

import json
import time
from typing import Any

import pytest
from machine_kit import CONFIG, ROOT, Machine, booted, machine

__all__ = ["booted", "machine"]  # fixtures


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
    assert "npc" in machine.eternad("status")


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


def test_a_damaged_database_is_no_restart_loop(machine: Machine) -> None:
    """Exit code 74: the unit fails once and stays so, the journal names both commands, and the failure is reported."""
    machine.run("systemctl", "start", "eternad")
    machine.run("systemctl", "stop", "eternad")
    machine.run("sh", "-c", "head -c 4096 /dev/urandom | dd of=/var/lib/eternad/eternad.db conv=notrunc status=none")
    machine.run("systemctl", "start", "eternad", check=False)
    time.sleep(4)  # twice RestartSec
    names = ("ActiveState", "ExecMainStatus", "NRestarts")
    assert [machine.show("eternad", name) for name in names] == ["failed", "74", "0"]
    assert "eternad doctor" in machine.messages("eternad")
    report = machine.messages("eternad-failure@eternad.service.service")
    assert "eternad.service has failed for good" in report


def last_run(machine: Machine) -> dict[str, Any]:
    """The newest run, `{"state": "NONE"}` before there is one."""
    runs: list[dict[str, Any]] = json.loads(machine.eternad("history", "--json"))
    return runs[0] if runs else {"state": "NONE"}


def engine_of(machine: Machine) -> tuple[str, int | None]:
    """What the daemon says of the engine: its state, and the version that it serves."""
    [model] = json.loads(machine.eternad("status", "--json"))["models"]
    return model["engine_state"], model["engine_serves"]


def test_an_update_inside_the_units(machine: Machine) -> None:
    """A dropped file becomes a version that the engine serves, all of it sandboxed; a new engine gets it again."""
    machine.run("systemctl", "start", "eternad-engine@npc", "eternad")
    drop_content(machine)
    machine.wait("LIVE", lambda: last_run(machine)["state"] == "LIVE", 120)
    machine.wait("the new version", lambda: engine_of(machine) == ("ok", 1), 20)
    said = machine.run("journalctl", "-o", "cat", "-u", "eternad", "ETERNAD_RUN=npc-00001")
    assert all(word in said for word in ("begins", "is accepted", "is live"))
    assert "lore.jsonl" in machine.run("journalctl", "-o", "cat", "ETERNAD_FILE=content/npc/lore.jsonl")
    machine.run("systemctl", "restart", "eternad-engine@npc")
    machine.wait("the engine's return", lambda: engine_of(machine) == ("ok", 1), 60)
    assert machine.show("eternad", "NRestarts") == "0"


def step(machine: Machine) -> int:
    """How far the trainer is."""
    text = machine.run("sh", "-c", "cat /var/lib/eternad/runs/npc-00001/progress.json", check=False)
    return int(json.loads(text)["step"]) if text else 0


def test_sigterm_in_mid_training_keeps_the_work(machine: Machine) -> None:
    """A stop writes a checkpoint, counts as no failure, and the next start goes on from there to the end."""
    machine.write("/etc/eternad/eternad.toml", CONFIG.format(epochs=100))
    machine.run("systemctl", "start", "eternad")
    drop_content(machine)
    machine.wait("step 20", lambda: step(machine) >= 20, 90)
    machine.run("systemctl", "stop", "eternad")
    assert [machine.show("eternad", name) for name in ("Result", "ExecMainStatus")] == ["success", "0"]
    assert machine.run("ls", "/var/lib/eternad/runs/npc-00001/checkpoint.json")
    stopped_at = step(machine)
    machine.run("systemctl", "start", "eternad")
    machine.wait("a later step", lambda: step(machine) > stopped_at, 60)
    # there is no engine that could make it LIVE
    machine.wait("the end", lambda: last_run(machine)["state"] in ("ACCEPTED", "PUBLISHED"), 120)
    assert (last_run(machine)["id"], last_run(machine)["attempts"]) == ("npc-00001", 0)


def reload_with(machine: Machine, hang_seconds: float) -> None:
    """How long a trainer may stand still from now on."""
    machine.write("/etc/eternad/eternad.toml", f"hang_seconds = {hang_seconds}\n" + CONFIG.format(epochs=15))
    machine.run("systemctl", "reload", "eternad")


@pytest.mark.timeout(600)
def test_a_hung_trainer_is_ended_and_the_daemon_goes_on(machine: Machine) -> None:
    """The trainer stands still: killed after `hang_seconds`, begun again from its checkpoint, one attempt used up."""
    machine.write("/etc/eternad/eternad.toml", "hang_seconds = 600.0\n" + CONFIG.format(epochs=15))
    machine.run("systemctl", "start", "eternad")
    drop_content(machine)
    machine.wait("step 10", lambda: step(machine) >= 10, 180)
    daemon = machine.show("eternad", "MainPID")
    trainer = machine.run("pgrep", "-f", "strategies.train").split()[0]
    machine.run("kill", "-STOP", trainer)
    reload_with(machine, 5.0)
    machine.wait("the end of the trainer", lambda: "made no progress" in machine.messages("eternad"), 120)
    reload_with(machine, 600.0)  # a busy machine may need long to load the libraries again
    assert trainer not in machine.run("pgrep", "-f", "strategies.train", check=False).split()
    machine.wait("the end", lambda: last_run(machine)["state"] in ("ACCEPTED", "PUBLISHED"), 300)
    assert (last_run(machine)["id"], last_run(machine)["attempts"]) == ("npc-00001", 1)
    assert machine.show("eternad", "MainPID") == daemon


def test_one_daemon_per_state_directory(machine: Machine) -> None:
    """A second daemon ends with 75 and names the first, which goes on."""
    machine.run("systemctl", "start", "eternad")
    command = "/opt/eternad/bin/eternad run --config /etc/eternad/eternad.toml 2>&1; echo $?"
    said = machine.run("setpriv", "--reuid=eternad", "--regid=eternad", "--init-groups", "sh", "-c", command)
    assert said.split()[-1] == "75"
    assert machine.show("eternad", "MainPID") in said
    assert machine.show("eternad", "ActiveState") == "active"


def test_the_target_is_all_of_it(machine: Machine) -> None:
    """`enable` and `start` of the target bring up what was enabled; its stop ends all."""
    machine.run("systemctl", "enable", "eternad.target", "eternad.service", "eternad-engine@npc.service")
    machine.run("systemctl", "start", "eternad.target")
    for unit in ("eternad", "eternad-engine@npc"):
        machine.wait(f"{unit} active", lambda unit=unit: machine.show(unit, "ActiveState") == "active")  # type: ignore[misc]
        assert machine.show(unit, "Slice") == "eternad.slice"
    machine.run("systemctl", "stop", "eternad.target")
    machine.wait("the stop", lambda: machine.show("eternad-engine@npc", "ActiveState") == "inactive")
    machine.wait("the stop", lambda: machine.show("eternad", "ActiveState") == "inactive")
    machine.run("systemctl", "disable", "eternad.target", "eternad.service", "eternad-engine@npc.service")


def test_the_walk_of_the_docs_runs(machine: Machine) -> None:
    """Every command of "To a running unit", as it stands, ends in a daemon, an engine and a page."""
    text = (
        (ROOT / "docs" / "systemd.md").read_text().split("tests/test_systemd_boot.py runs these lines, too -->", 1)[1]
    )
    commands = text.split("```sh\n", 1)[1].split("```", 1)[0].splitlines()
    machine.run("rm", "/etc/eternad/eternad.toml")
    for command in commands:
        machine.run("sh", "-c", command.replace("sudo ", "", 1))
    assert len(commands) > 10
    said = machine.eternad("status")
    assert "eternad is running" in said
    assert "/srv/eternad" in said
    machine.run("systemctl", "disable", "--now", *commands[-3].split("--now ")[1].split())
    machine.eternad("install-units")
    machine.run("systemctl", "daemon-reload")


def test_uninstall_keeps_state_and_configuration(machine: Machine) -> None:
    """After `uninstall-units` systemd knows no unit of ours; what was learned and configured is there."""
    machine.run("systemctl", "start", "eternad")
    machine.run("systemctl", "stop", "eternad")
    machine.eternad("uninstall-units")
    machine.run("systemctl", "daemon-reload")
    assert machine.run("systemctl", "list-unit-files", "--no-legend", "eternad*", check=False) == ""
    assert machine.run("ls", "/var/lib/eternad/eternad.db", "/etc/eternad/eternad.toml")
    machine.eternad("install-units")
    machine.run("systemctl", "daemon-reload")
