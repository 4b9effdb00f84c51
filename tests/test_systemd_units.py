"""The units as systemd reads them: no unknown key, exposure below its threshold, every relaxed directive explained."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from daemon.machine.units import DROP_INS, shipped_directory

SHIPPED = shipped_directory()
UNITS = sorted(path.name for path in SHIPPED.iterdir() if path.suffix in {".service", ".socket", ".target", ".slice"})
SERVICES = [name for name in UNITS if name.endswith(".service")]
EXPOSURES = [
    ("eternad.service", (), 0.2),
    ("eternad.service", ("gpu-nvidia",), 0.4),
    ("eternad.service", ("gpu-amd",), 0.4),
    ("eternad.service", ("gpu-intel",), 0.4),
    ("eternad.service", ("nfs",), 0.2),
    ("eternad.service", ("gloo",), 0.5),
    ("eternad.service", ("page",), 0.5),
    ("eternad.service", ("tcp",), 0.9),
    ("eternad.service", ("network",), 1.1),
    ("eternad-engine@.service", (), 0.2),
    ("eternad-engine@.service", ("gpu-nvidia",), 0.4),
    ("eternad-gateway.service", (), 0.2),
    ("eternad-parse@.service", (), 0.2),
    ("eternad-page.service", (), 0.5),
    ("eternad-failure@.service", (), 1.1),
]
"""Unit, drop-ins, the highest exposure allowed (systemd 252's figures, 0 to 10)."""
ANYWHERE = {"RootDirectory"}
"""0.1 in every unit: the interpreter and its libraries live in the /usr of the machine; eternad.service says so."""
ROW_OF = {"DeviceAllow": "DevicePolicy", "IPAddressAllow": "IPAddressDeny"}
"""Directives that systemd judges together."""

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian: apt-get install systemd)"
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The shipped units with a program that exists on this machine in the place of ours."""
    for path in SHIPPED.iterdir():
        text = re.sub(r"/opt/eternad/bin/(eternad|python)", "/bin/true", path.read_text())
        (tmp_path / path.name).write_text(text)
    return tmp_path


def add_drop_ins(directory: Path, unit: str, names: Sequence[str]) -> None:
    """Put drop-ins beside a unit, where systemd looks for them."""
    for name in names:
        target = directory / f"{unit}.d" / f"50-{name}.conf"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(directory / f"drop-in-{name}.conf", target)


def verify(directory: Path, *units: str) -> subprocess.CompletedProcess[str]:
    """`--recursive-errors=no` makes unknown keys an error; without it `verify` only prints them and exits 0."""
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *(str(directory / u) for u in units)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def security(directory: Path, unit: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`systemd-analyze security` of a file."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", *options, str(directory / unit)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def exposed_directives(directory: Path, unit: str) -> dict[str, float]:
    """Directive -> what its rows add to the exposure."""
    found: dict[str, float] = {}
    for row in json.loads(security(directory, unit, "--json=short").stdout):
        name = re.split(r"[=/]", row["name"])[0]
        if row["exposure"] and name not in ANYWHERE:
            directive = ROW_OF.get(name, name)
            found[directive] = round(found.get(directive, 0) + float(row["exposure"]), 1)
    return found


def explained_directives(*paths: Path) -> dict[str, float]:
    """Directive -> the sum of the figures in the comments above it: `# RELAXED figure (strictest). what breaks`."""
    found: dict[str, float] = {}
    for path in paths:
        for figure, name in re.findall(
            r"^# RELAXED (0\.\d) \(.+\)\. (?:run|doc): .{10,}\n([A-Za-z]+)=", path.read_text(), re.MULTILINE
        ):
            directive = ROW_OF.get(name, name)
            found[directive] = round(found.get(directive, 0) + float(figure), 1)
    return found


def test_verify_is_clean(directory: Path) -> None:
    """Every unit, with every drop-in, holds only keys and values that systemd knows, and starts what exists."""
    for name, units in DROP_INS.items():
        for unit in units:
            add_drop_ins(directory, unit, [name])
    result = verify(directory, *UNITS)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("line", ["ProtectSysten=strict", "WatchdogSec=soon", "ExecStart=/nowhere/eternad"])
def test_verify_finds_mistakes(line: str, directory: Path) -> None:
    """The check above can fail: a misspelt key, a wrong value, a missing program."""
    unit = directory / "eternad.service"
    unit.write_text(re.sub(r"^ExecStart=.*$", line, unit.read_text(), flags=re.M))
    assert verify(directory, unit.name).returncode != 0


@pytest.mark.parametrize(("unit", "drop_ins", "exposure"), EXPOSURES)
def test_exposure(unit: str, drop_ins: tuple[str, ...], exposure: float, directory: Path) -> None:
    """No unit is more open than promised; the threshold is ten times the exposure."""
    add_drop_ins(directory, unit, drop_ins)
    result = security(directory, unit, f"--threshold={round(exposure * 10)}")
    assert result.returncode == 0, result.stdout[-200:]


def test_exposure_rises_without_a_sandbox(directory: Path) -> None:
    """The check above can fail: one directive less is over the threshold."""
    unit = directory / "eternad.service"
    unit.write_text(unit.read_text().replace("PrivateNetwork=yes\n", ""))
    assert security(directory, unit.name, "--threshold=5").returncode != 0


@pytest.mark.parametrize(("unit", "drop_ins", "exposure"), EXPOSURES)
def test_every_relaxed_directive_is_explained(
    unit: str, drop_ins: tuple[str, ...], exposure: float, directory: Path
) -> None:
    """Whatever adds to the exposure stands below a comment with that figure and what the strictest value breaks."""
    add_drop_ins(directory, unit, drop_ins)
    explained = explained_directives(SHIPPED / unit, *(SHIPPED / f"drop-in-{name}.conf" for name in drop_ins))
    assert explained == exposed_directives(directory, unit)


def test_every_service_has_a_threshold() -> None:
    """A new unit or drop-in does not slip past the two tests above."""
    assert {unit for unit, _, _ in EXPOSURES} == set(SERVICES)
    assert {name for _, drop_ins, _ in EXPOSURES for name in drop_ins} == set(DROP_INS)


@pytest.mark.parametrize("unit", SERVICES)
def test_services_are_bounded(unit: str) -> None:
    """No core dumps (they hold weights and credentials), and a failure of anything that stays up is reported."""
    text = (SHIPPED / unit).read_text()
    assert "\nLimitCORE=0\n" in text
    if "\nRestart=on-failure\n" in text:
        assert "\nOnFailure=eternad-failure@%n.service\n" in text
        codes = "2 74 78" if unit == "eternad.service" else "2 78"  # the others have no database
        assert f"\nRestartPreventExitStatus={codes}\n" in text
