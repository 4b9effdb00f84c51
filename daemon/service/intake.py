"""From dropped files to the journal: the watcher, the step that reads a file, and the orders about the quarantine."""

import time
from functools import partial

from daemon import ingest
from daemon.control import Command
from daemon.log import about
from daemon.machine import sd_notify
from daemon.service.house import House, log
from daemon.service.orders import CannotBeDone, Said
from daemon.state import files
from daemon.state.trouble import trouble_of
from daemon.watch import Watcher

FILES_PER_TURN = 256


class Intake:
    """What comes in."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._watcher: Watcher | None = None
        self.is_behind = False
        """Whether more waits than one turn took in: then the next one follows at once."""

    def watch(self) -> None:
        """Watch the library by the present configuration; the first look is a whole scan."""
        self.close()
        self._watcher = Watcher(self._house.config.library_directory, self._house.config.watch)
        self._watcher.start()

    def close(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.stop()

    @property
    def degraded(self) -> str | None:
        """Why nothing is found at the moment, or None."""
        return None if self._watcher is None else self._watcher.degraded

    def counters(self) -> dict[str, float]:
        """Counts since the start, for the metrics."""
        if self._watcher is None:
            return {}
        return {
            "overflow": self._watcher.overflow_total,
            "scans": self._watcher.scans_total,
            "files_found_by_rescan": self._watcher.files_found_by_rescan,
        }

    def take_in(self, now: float) -> int:
        """Finished files into the journal; how many files were read."""
        if self._watcher is None:
            return 0
        ingest.expire(self._house.database, now)
        found = self._watcher.finished(now, partial(files.known, self._house.database), FILES_PER_TURN)
        self.is_behind = False  # a turn that fails is followed by a pause
        is_behind = len(found) >= FILES_PER_TURN
        for finished in found:
            is_behind |= self._take_in(finished, now)
            sd_notify.notify(WATCHDOG=1)  # a large drop is progress, too
        self.is_behind = is_behind
        return len(found)

    def _take_in(self, finished: files.Finished, now: float) -> bool:
        """The daemon's other catch-all boundary: one file that breaks is tried again later, the others go on.

        Returns whether more of it waits.
        """
        try:
            outcome = ingest.ingest_file(self._house.database, self._house.config, finished, now)
        except Exception as error:
            if trouble_of(error):
                raise  # nothing is wrong with the file: the turn is tried again when the disk takes it
            path = finished.path
            log.exception("%r could not be taken in; it is tried again at the next scan", path, extra=about(file=path))
            return False
        if outcome.awaited and self._watcher is not None:
            self._watcher.expect(outcome.awaited)
        entry = about(file=outcome.path)
        if outcome.state == "quarantined":
            log.warning("%s", outcome.reason, extra=entry)
        else:
            counted = (outcome.path, outcome.state, outcome.new, outcome.duplicates)
            log.info("%s: %s, %d new, %d duplicates", *counted, extra=entry)
        if outcome.state == "partial" and self._watcher is not None:
            self._watcher.again(finished.relative)
        return outcome.state == "partial"

    def scan(self, _command: Command) -> Said:
        """Compare the whole library with what is known, now."""
        if self._watcher is not None:
            self._watcher.request_scan()
        taken = self.take_in(time.time())
        return f"scanned; {taken} finished files were read", {"files": taken}

    def retry(self, command: Command) -> Said:
        """Try one entry of the quarantine again, or all that may succeed."""
        identity, arguments = command.order.quarantine_id, (self._house.database, self._house.config)
        try:
            said = [ingest.retry(*arguments, identity, time.time())] if identity is not None else None
        except ingest.CannotRetry as error:
            raise CannotBeDone(str(error)) from None
        if said is None:
            said = ingest.retry_all(*arguments, time.time())
        if self._watcher is not None:
            self._watcher.request_scan()
        return "\n".join(said) or "nothing in the quarantine can be tried again", {"tried": len(said)}

    def drop(self, command: Command) -> Said:
        """Forget an entry of the quarantine."""
        if command.order.quarantine_id is None:
            raise CannotBeDone("which entry? see: eternad quarantine ls")
        try:
            return ingest.drop(self._house.database, self._house.config, command.order.quarantine_id), {}
        except ingest.CannotRetry as error:
            raise CannotBeDone(str(error)) from None
