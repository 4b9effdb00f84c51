"""Keeps the loop turning while the disk is full or read-only: a turn that fails is counted, and the next one waits."""

import math
from collections import Counter
from collections.abc import Callable

from daemon.machine.ballast import Ballast
from daemon.service.house import House, log
from daemon.state.database import DatabaseError
from daemon.state.trouble import Trouble, is_read_only, trouble_of

PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.5, 30.0
LOG_SECONDS, BALLAST_SECONDS = 60.0, 60.0
CALM_SECONDS = 60.0
"""Without a failed turn, until the trouble is over: a turn that had nothing to write proves nothing."""
ADVICE: dict[Trouble, str] = {
    "disk_full": "the disk is full: make room; the daemon goes on by itself",
    "read_only": "the file system is read-only: mount it writable; the daemon goes on by itself",
    "io_error": "the disk does not do what it is told: see the kernel's log; the daemon tries again",
    "busy": "another program holds the database: end it; the daemon tries again",
    "corrupt": "the database is damaged: run `eternad doctor`, then `eternad restore BACKUP`",
}


class Patience:
    """One per daemon. Everything but trouble with the storage is raised: a restart may help there, and not here."""

    def __init__(self, house: House, make_room: Callable[[], object]) -> None:
        self._house, self._make_room = house, make_room
        self.ballast = Ballast(house.config.state_directory / "ballast", house.config.disk_free_bytes_min)
        self.counts = Counter[str](turn_failures=0, disk_full=0)
        self.trouble = ""
        """Why turns fail at the moment, for `status`; empty while they do not."""
        self._in_a_row = 0
        self._not_before = self._failed_at = self._logged_at = self._ballast_at = -math.inf

    def turn(self, work: Callable[[float], None], now: float) -> None:
        """Do the work of one turn, unless an earlier failure says to wait."""
        if now < self._not_before <= now + PAUSE_SECONDS_MAX:  # else: the clock was set back
            return
        try:
            work(now)
            self._keep_ballast(now)
        except (DatabaseError, OSError) as error:
            trouble = trouble_of(error)
            if trouble in (None, "corrupt"):
                raise
            self._bear(trouble, error, now)
            return
        self._in_a_row = 0
        if self.trouble and not self._failed_at <= now < self._failed_at + CALM_SECONDS:
            log.warning("the disk takes everything again")
            self.trouble = ""

    def counters(self) -> dict[str, float]:
        """For the snapshot and the metrics."""
        return {**self.counts, "ballast_released": self.ballast.released_total}

    def _bear(self, trouble: Trouble, error: Exception, now: float) -> None:
        if trouble == "io_error" and is_read_only(self._house.config.state_directory):
            trouble = "read_only"  # of a file that was open before, SQLite says only that it cannot be written
        self._failed_at = now
        self.counts["turn_failures"] += 1
        self.counts["disk_full"] += trouble == "disk_full"
        self.trouble = f"{self._house.config.state_directory}: {ADVICE[trouble]} ({error})"
        if not self._logged_at <= now < self._logged_at + LOG_SECONDS:
            self._logged_at = now
            log.error("%s", self.trouble)
            if trouble == "disk_full":
                self._clean_up()
        self._not_before = now + min(PAUSE_SECONDS * 2.0 ** min(self._in_a_row, 10), PAUSE_SECONDS_MAX)
        self._in_a_row += 1

    def _clean_up(self) -> None:
        """Give up the ballast, then remove what is of no more use: the first makes room for the rows of the second."""
        if freed := self.ballast.release():
            log.warning("the ballast is given up: %.0f MiB of room", freed / 2**20)
        try:
            self._make_room()
        except (DatabaseError, OSError) as error:
            if trouble_of(error) in (None, "corrupt"):
                raise

    def _keep_ballast(self, now: float) -> None:
        if not self._ballast_at <= now < self._ballast_at + BALLAST_SECONDS:
            self._ballast_at = now
            self.ballast.keep()
