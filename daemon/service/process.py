"""The daemon as a process: one per state directory, signals that only set flags, systemd told how it goes."""

import contextlib
import fcntl
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

from daemon import config as configuration
from daemon import control, intake, log, web
from daemon.machine import memory, sd_notify
from daemon.machine.ballast import Ballast
from daemon.service.house import log as logger
from daemon.service.loop import Service
from daemon.service.patience import ADVICE
from daemon.state.database import DatabaseError, NewerDatabase
from daemon.state.integrity import DamagedDatabase
from daemon.state.trouble import trouble_of

EX_OK, EX_TEMPFAIL, EX_CONFIG, EX_IOERR = 0, 75, 78, 74
PASSING = ("disk_full", "read_only", "io_error", "busy")
"""Troubles of the storage that may be over at the next start."""


class Flags:
    """What signals ask for; the loop looks at it once per turn."""

    def __init__(self) -> None:
        self.stop = self.reload = False

    def install(self) -> None:
        """SIGTERM and SIGINT stop, SIGHUP reloads."""

        def ask(number: int, _frame: FrameType | None) -> None:
            self.reload = self.reload or number == signal.SIGHUP
            self.stop = self.stop or number != signal.SIGHUP

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, ask)


def run(config_path: Path) -> int:
    """Run the daemon until SIGTERM; returns its exit code (sysexits.h).

    75: another daemon, or a disk that takes nothing: a later start may succeed. 74: a damaged or newer database.
    78: a bad configuration. The last two need a person, so the unit is not restarted.
    """
    memory.stay_small()
    log.configure()
    flags = Flags()
    flags.install()
    try:
        config = configuration.load(config_path)
    except configuration.ConfigError as error:
        logger.critical("%s", error)
        return EX_CONFIG
    try:
        config.state_directory.mkdir(parents=True, exist_ok=True)
        lock = acquire(config.state_directory)
        return EX_TEMPFAIL if lock is None else _serve(Service(config, config_path), flags)
    except NewerDatabase as error:
        logger.critical("%s", error)
    except (DatabaseError, DamagedDatabase, OSError) as error:
        logger.critical("%s", why_it_ends(config, error))
        return EX_TEMPFAIL if trouble_of(error) in PASSING else EX_IOERR
    return EX_IOERR


def why_it_ends(config: configuration.Config, error: Exception) -> str:
    """One sentence about the disk or the database, with what to do; raises again what is about neither."""
    trouble = "corrupt" if isinstance(error, DamagedDatabase) else trouble_of(error)
    if trouble is None and not isinstance(error, DatabaseError | PermissionError):
        raise error
    if trouble == "disk_full":  # the supervisor starts us again: then there is some room
        Ballast(config.state_directory / "ballast", config.disk_free_bytes_min).release()
    advice = "see: eternad doctor" if trouble is None else ADVICE[trouble]
    return f"{config.state_directory}: {error}: {advice}"


def _serve(service: Service, flags: Flags) -> int:
    service.start()
    state = service.house.config.state_directory
    endpoint = control.serve(
        control.socket_path(state), service.commands, service.snapshot, link=state / "control.sock"
    )
    endpoints = [endpoint, *_optional_endpoints(service)]
    logger.info("ready, watching %s", service.house.config.library_directory)
    sd_notify.notify(READY=1, STATUS="watching")
    try:
        while not flags.stop:
            if flags.reload:
                flags.reload = False
                with contextlib.suppress(configuration.ConfigError):  # logged; the old one stays
                    service.reload()
            service.turn(time.time())
            sd_notify.notify(WATCHDOG=1)
            service.wait(service.pause_seconds)
    finally:
        sd_notify.notify(STOPPING=1, STATUS="stopping; a running update writes a checkpoint")
        for each in endpoints:
            each.close()
        service.close()
    return EX_OK


def _optional_endpoints(service: Service) -> list[web.Handle | intake.Handle]:
    """The status page and the game servers' socket, as far as the configuration wants them."""
    page = web.serve(lambda: service.house.config, service.commands, service.snapshot)
    endpoints: list[web.Handle | intake.Handle] = [] if page is None else [page]
    door = intake.serve(lambda: service.house.config, time.time)
    return endpoints if door is None else [*endpoints, door]


def acquire(state_directory: Path) -> IO[str] | None:
    """The lock of a state directory for as long as the file stays open; None when another daemon holds it."""
    lock = (state_directory / "daemon.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        print(f"eternad: {state_directory} is in use by the daemon with pid {holder}", file=sys.stderr)
        lock.close()
        return None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
