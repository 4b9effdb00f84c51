"""Installs the systemd units that are shipped with the program, made to fit where it is installed.

Files go below `/usr/local/lib` (units, sysusers, tmpfiles): the place of what the administrator's own packages bring.
`/etc/systemd/system` stays free for `systemctl edit`, and wins. The first line of each file marks it as ours: only
such files are replaced or removed, so nothing that somebody else wrote is ever lost.
"""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

MARK = "# Installed by `eternad install-units`: change it with `systemctl edit`, not here.\n"
SHIPPED_PREFIX = "/opt/eternad"
"""The virtual environment in the files as they are shipped; replaced by the real one."""
UNITS, SYSUSERS, TMPFILES = (Path("usr/local/lib") / name for name in ("systemd/system", "sysusers.d", "tmpfiles.d"))
DROP_INS: Mapping[str, tuple[str, ...]] = {
    "gpu-nvidia": ("eternad.service", "eternad-engine@.service"),
    "gpu-amd": ("eternad.service", "eternad-engine@.service"),
    "gpu-intel": ("eternad.service", "eternad-engine@.service"),
    "gloo": ("eternad.service",),
    "page": ("eternad.service",),
    "tcp": ("eternad.service", "eternad-engine@.service", "eternad-gateway.service"),
    "network": ("eternad.service",),
    "nfs": ("eternad.service",),
}
"""Drop-in -> the units that it changes. None is installed unless asked for."""
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""Directories that a unit with ProtectHome= and PrivateTmp= finds empty."""
NEXT_STEPS = ("systemd-sysusers eternad.conf", "systemd-tmpfiles --create eternad.conf", "systemctl daemon-reload")
"""What an administrator runs after an install; after an uninstall only the last one."""


class UnitsError(Exception):
    """Units cannot be installed or removed; the message says which file is in the way and what to do."""


class Change(msgspec.Struct, frozen=True):
    """One file that was, or in a dry run would be, touched."""

    action: Literal["create", "replace", "keep", "remove"]
    path: Path


def shipped_directory() -> Path:
    """Where the shipped files lie: in the installed environment's `share`, or in the checkout."""
    installed = Path(sys.prefix) / "share" / "eternad" / "systemd"
    checkout = Path(__file__).resolve().parents[2] / "systemd"
    for directory in (checkout, installed):
        if (directory / "eternad.service").is_file():
            return directory
    raise UnitsError(f"no units in {checkout} nor in {installed}: install eternad again from its wheel")


def install_units(
    prefix: Path = Path(sys.prefix),
    *,
    root: Path = Path("/"),
    drop_ins: Iterable[str] = (),
    dry_run: bool = False,
    source: Path | None = None,
) -> list[Change]:
    """Write units, users and directories below `root`, to run the virtual environment at `prefix`.

    `drop_ins` names keys of `DROP_INS`; what was chosen in an earlier call and is not named now is removed again, and
    so is whatever an older version shipped. A second call with the same arguments changes nothing. Neither users nor
    directories are made, nor is systemd told: see `NEXT_STEPS`. With `dry_run` nothing is written.

    Raises UnitsError, before anything is written: for an unknown drop-in, for a prefix below a home directory (the
    units cannot see those), for a file of another's in the way, and when `root` cannot be written.
    """
    _check_prefix(prefix)
    wanted = _wanted(source or shipped_directory(), prefix, root, list(drop_ins))
    changes = [_planned(path, text) for path, text in sorted(wanted.items())]
    changes += [Change("remove", path) for path in _installed(root) if path not in wanted]
    if not dry_run:
        _apply(changes, wanted)
    return changes


def uninstall_units(*, root: Path = Path("/"), dry_run: bool = False) -> list[Change]:
    """Remove every file that `install_units` wrote below `root`. Users, state, configuration and library stay.

    Raises UnitsError when `root` cannot be written.
    """
    changes = [Change("remove", path) for path in _installed(root)]
    if not dry_run:
        _apply(changes, {})
    return changes


def _check_prefix(prefix: Path) -> None:
    hidden = next((each for each in HIDDEN if prefix.is_relative_to(each)), None)
    if hidden is not None:
        raise UnitsError(
            f"{prefix} is below {hidden}, which the units do not see (ProtectHome=, PrivateTmp=): install the program"
            f" into an environment of its own, for example {SHIPPED_PREFIX}"
        )
    if not re.fullmatch(r"/[\w/.+-]*", str(prefix), re.ASCII):
        raise UnitsError(f"{prefix} must be an absolute path of letters, digits and / . _ + - to stand in a unit")


def _wanted(source: Path, prefix: Path, root: Path, drop_ins: Sequence[str]) -> dict[Path, str]:
    """Target -> text of everything that shall be there."""
    units = [path for path in source.iterdir() if path.suffix in {".service", ".socket", ".target", ".slice"}]
    files = {root / UNITS / path.name: path for path in units}
    files[root / SYSUSERS / "eternad.conf"] = source / "eternad.sysusers.conf"
    files[root / TMPFILES / "eternad.conf"] = source / "eternad.tmpfiles.conf"
    for name in drop_ins:
        if name not in DROP_INS:
            raise UnitsError(f"no drop-in `{name}`; there are: {', '.join(DROP_INS)}")
        for unit in DROP_INS[name]:
            files[root / UNITS / f"{unit}.d" / f"50-{name}.conf"] = source / f"drop-in-{name}.conf"
    return {
        target: MARK + path.read_text("utf-8").replace(SHIPPED_PREFIX, str(prefix)) for target, path in files.items()
    }


def _planned(path: Path, text: str) -> Change:
    if not path.exists():
        return Change("create", path)
    present = path.read_text("utf-8", "replace")
    if not present.startswith(MARK):
        raise UnitsError(f"{path} was not written by eternad: move it away, or put what it adds into a drop-in")
    return Change("keep" if present == text else "replace", path)


def _installed(root: Path) -> list[Path]:
    """Every file that carries our mark."""
    found = [
        *(root / UNITS).glob("eternad*"), *(root / UNITS).glob("eternad*.d/*.conf"),
        root / SYSUSERS / "eternad.conf", root / TMPFILES / "eternad.conf",
    ]  # fmt: skip
    return sorted(path for path in found if path.is_file() and path.read_text("utf-8", "replace").startswith(MARK))


def _apply(changes: Sequence[Change], wanted: Mapping[Path, str]) -> None:
    try:
        for change in changes:
            if change.action == "remove":
                change.path.unlink(missing_ok=True)
                _remove_empty(change.path.parent)
            elif change.action != "keep":
                _replace(change.path, wanted[change.path])
    except OSError as error:
        raise UnitsError(f"{error.filename}: {error.strerror}; run it as root, or with --root DIRECTORY") from None


def _remove_empty(directory: Path) -> None:
    """A drop-in directory that holds nothing any more."""
    if directory.name.endswith(".d") and directory.parent.name == "system" and not any(directory.iterdir()):
        directory.rmdir()


def _replace(path: Path, text: str) -> None:
    """Write all of it or nothing, so that systemd never reads half a unit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
