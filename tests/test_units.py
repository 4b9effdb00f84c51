"""Installing, upgrading and removing the units, below a directory in the place of /."""

import tomllib
from pathlib import Path

import pytest

from daemon.machine.units import (
    DROP_INS,
    MARK,
    SYSUSERS,
    UNITS,
    UnitsError,
    install_units,
    shipped_directory,
    uninstall_units,
)

PREFIX = Path("/srv/tools/eternad-1.0")


def files_below(root: Path) -> set[str]:
    """Every file, relative to `root`."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_install_fits_the_units_to_their_environment(tmp_path: Path) -> None:
    """Each unit starts the program of the given environment, and says that it is ours."""
    changes = install_units(PREFIX, root=tmp_path)
    unit = (tmp_path / UNITS / "eternad.service").read_text()
    assert unit.startswith(MARK)
    assert f"ExecStart={PREFIX}/bin/eternad run --config /etc/eternad/eternad.toml" in unit
    assert not any("/opt/eternad" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert {change.action for change in changes} == {"create"}
    assert {str(change.path.relative_to(tmp_path)) for change in changes} == files_below(tmp_path)
    assert (tmp_path / SYSUSERS / "eternad.conf").stat().st_mode & 0o777 == 0o644


def test_a_second_install_changes_nothing(tmp_path: Path) -> None:
    """Same arguments, same files: every change is `keep`."""
    install_units(PREFIX, root=tmp_path, drop_ins=["tcp"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {change.action for change in install_units(PREFIX, root=tmp_path, drop_ins=["tcp"])} == {"keep"}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_dry_run_says_and_does_not(tmp_path: Path) -> None:
    """A dry run plans the same changes and writes nothing."""
    planned = install_units(PREFIX, root=tmp_path, dry_run=True)
    assert files_below(tmp_path) == set()
    assert install_units(PREFIX, root=tmp_path) == planned
    assert uninstall_units(root=tmp_path, dry_run=True)
    assert files_below(tmp_path)


@pytest.mark.parametrize("name", list(DROP_INS))
def test_drop_ins_go_to_their_units(name: str, tmp_path: Path) -> None:
    """Each drop-in is shipped, and installed beside every unit that it changes."""
    install_units(PREFIX, root=tmp_path, drop_ins=[name])
    for unit in DROP_INS[name]:
        assert (tmp_path / UNITS / unit).is_file()
        assert (tmp_path / UNITS / f"{unit}.d" / f"50-{name}.conf").is_file()


def test_every_shipped_drop_in_can_be_chosen() -> None:
    """No file is shipped that no option installs."""
    shipped = {path.stem.removeprefix("drop-in-") for path in shipped_directory().glob("drop-in-*.conf")}
    assert shipped == set(DROP_INS)


def test_an_upgrade_replaces_and_removes_what_was_ours(tmp_path: Path) -> None:
    """A changed unit is replaced; a drop-in no longer chosen and a unit no longer shipped go away."""
    install_units(PREFIX, root=tmp_path, drop_ins=["gpu-nvidia"])
    gone = tmp_path / UNITS / "eternad-legacy.service"
    gone.write_text(MARK + "[Unit]\n")
    actions = {change.path: change.action for change in install_units(Path("/opt/new"), root=tmp_path)}
    assert actions[tmp_path / UNITS / "eternad.service"] == "replace"
    assert actions[gone] == "remove"
    assert not gone.exists()
    assert not list((tmp_path / UNITS).glob("*.d"))


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    """A unit of the same name without our mark stops the install before anything is written."""
    mine = tmp_path / UNITS / "eternad.service"
    mine.parent.mkdir(parents=True)
    mine.write_text("[Service]\nExecStart=/bin/true\n")
    with pytest.raises(UnitsError, match=r"eternad\.service was not written by eternad"):
        install_units(PREFIX, root=tmp_path)
    assert files_below(tmp_path) == {str(UNITS / "eternad.service")}
    assert uninstall_units(root=tmp_path) == []


def test_uninstall_leaves_nothing_of_ours_and_all_of_others(tmp_path: Path) -> None:
    """After an uninstall only what `systemctl edit` and others wrote is there."""
    override = tmp_path / UNITS / "eternad.service.d" / "override.conf"
    install_units(PREFIX, root=tmp_path, drop_ins=["tcp", "nfs"])
    override.write_text("[Service]\nNice=10\n")
    removed = uninstall_units(root=tmp_path)
    assert {change.action for change in removed} == {"remove"}
    assert files_below(tmp_path) == {str(override.relative_to(tmp_path))}


@pytest.mark.parametrize("prefix", ["/root/venv", "/home/ada/eternad/.venv", "/tmp/venv"])
def test_an_environment_that_the_units_cannot_see_is_refused(prefix: str, tmp_path: Path) -> None:
    """ProtectHome= and PrivateTmp= hide such a place: said before the unit fails to start."""
    with pytest.raises(UnitsError, match="which the units do not see"):
        install_units(Path(prefix), root=tmp_path)


@pytest.mark.parametrize("prefix", ["/opt/my venv", "/opt/100%", "/opt/$x", "relative/venv"])
def test_a_prefix_that_a_unit_cannot_spell_is_refused(prefix: str, tmp_path: Path) -> None:
    """Blanks, % and $ mean something in a unit."""
    with pytest.raises(UnitsError, match="must be an absolute path"):
        install_units(Path(prefix), root=tmp_path)


def test_an_unknown_drop_in_names_the_known(tmp_path: Path) -> None:
    """A misspelt drop-in is an error that lists them."""
    with pytest.raises(UnitsError, match="gpu-nvidia, gpu-amd"):
        install_units(PREFIX, root=tmp_path, drop_ins=["gpu-nvidea"])


def test_a_root_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    """A plain file in the way of the directories gives a sentence, not a traceback."""
    (tmp_path / "usr").write_text("")
    with pytest.raises(UnitsError, match="--root"):
        install_units(PREFIX, root=tmp_path)


def test_the_wheel_carries_the_units() -> None:
    """What is shipped in a checkout is packed as data of the wheel, and is flat, as that needs."""
    project = tomllib.loads((shipped_directory().parent / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["data-files"]["share/eternad/systemd"] == ["systemd/*"]
    assert all(path.is_file() for path in shipped_directory().iterdir())
