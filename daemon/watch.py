"""Which dropped files are finished. Events are hints; the reconcile scan of the whole directory is the truth.

inotify queues overflow, watches are lost, network file systems send nothing: so every file is found by a scan at the
start, every `scan_seconds`, after an overflow or an error, and on request. Events only make it faster.
"""

import logging
import math
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)  # fmt: skip
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from daemon.config import Watch
from daemon.drop_names import IGNORE_FILE, Ignored, printable
from daemon.machine.mounts import sends_no_events
from daemon.stability import Known, StabilityTracker
from daemon.state.files import Finished, Signature

log = logging.getLogger(__name__)

AREAS = ("content", "eval", "feedback")
POLL_SECONDS = 5.0
HINTS_MAX = 50_000
_EVENTS: list[type[FileSystemEvent]] = [
    DirCreatedEvent, DirMovedEvent, FileClosedEvent, FileCreatedEvent, FileModifiedEvent, FileMovedEvent,
]  # fmt: skip
"""A rename from outside gives only `created`, one from a temporary name inside only `moved`."""


class _Hints(FileSystemEventHandler):
    """Collects what events say, in watchdog's thread: paths, and those that were renamed when they were complete."""

    def __init__(self, library: Path, is_ignored: Ignored) -> None:
        self._prefix, self._is_ignored = f"{library}/", is_ignored
        self._lock = threading.Lock()
        self._paths: dict[str, bool] = {}
        self.too_many = False

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Note the path that exists after the event."""
        source, target = os.fsdecode(event.src_path), os.fsdecode(event.dest_path or "")
        relative = (target or source).removeprefix(self._prefix)
        if self._is_ignored(relative):
            return
        was_temporary = bool(target) and Ignored.is_temporary(os.path.basename(source))  # noqa: PTH119
        with self._lock:
            if len(self._paths) < HINTS_MAX:
                self._paths[relative] = self._paths.get(relative, False) or was_temporary
            else:
                self.too_many = True

    def take(self) -> dict[str, bool]:
        """`{path: is_complete}` since the last call."""
        with self._lock:
            taken, self._paths = self._paths, {}
        return taken


class _Overflows(logging.Handler):
    """watchdog tells of lost events in its log alone, in two lines: this counts the first of them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.total = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count one."""
        self.total += "events were lost" in record.getMessage()


class Watcher:
    """Finds finished files below the library directory."""

    def __init__(self, library: Path, watch: Watch) -> None:
        self._library, self._watch = library.absolute(), watch
        self._tracker = StabilityTracker(watch.stability_seconds, watch.never_stable_seconds)
        self._is_ignored = Ignored()
        self._hints = _Hints(self._library, self._is_ignored)
        self._overflows = _Overflows()
        self._observer: BaseObserver | None = None
        self._root: int | None = None
        self._scanned_at, self._overflows_scanned = -math.inf, 0
        self.is_polling = False
        """No events on this file system: scans alone find files."""
        self.degraded: str | None = None
        """Why nothing is found at the moment, or None."""
        self.scans_total = self.files_found_by_rescan = 0
        self.last_scan_seconds = 0.0

    @property
    def overflow_total(self) -> int:
        """How often the kernel lost events; each time a scan followed."""
        return self._overflows.total

    @property
    def waiting(self) -> int:
        """Files that are not finished, or not taken in yet."""
        return len(self._tracker)

    def start(self) -> None:
        """Hold the library directory (made if it is missing) and begin to listen; the first `finished` scans it."""
        for area in AREAS:
            (self._library / area).mkdir(parents=True, exist_ok=True)
        self._hold()
        logging.getLogger("watchdog").addHandler(self._overflows)
        self._listen()

    def stop(self) -> None:
        """Stop listening and let the directory go."""
        self._unlisten()
        logging.getLogger("watchdog").removeHandler(self._overflows)
        if self._root is not None:
            os.close(self._root)
            self._root = None

    def again(self, relative: str) -> None:
        """More of this file waits than was taken in: hand it over again at the next call."""
        self._tracker.again(relative)

    def expect(self, paths: Iterable[str]) -> None:
        """These files of a batch need no time to settle: their hash tells whether they are complete."""
        self._tracker.expect(paths)

    def request_scan(self) -> None:
        """Compare the whole directory at the next call of `finished`."""
        self._scanned_at = -math.inf

    def finished(self, now: float, known: Known, limit: int = 256) -> list[Finished]:
        """At most `limit` files that are finished and not known like this; the others come with the next call."""
        if not self._is_root_there():
            return []
        found: list[Finished] = []
        self._look_at_hints(now, known, found)
        if self._is_scan_due(now):
            self._scan(now, known, found)
        for relative in self._tracker.due(now):
            if len(found) >= limit:
                break
            self._look(relative, now, known, found)
            finished = self._tracker.finished(relative, now)
            found += [finished] if finished else []
        return found

    def _is_scan_due(self, now: float) -> bool:
        if self._hints.too_many or self._overflows.total > self._overflows_scanned or not self._is_listening():
            return True
        every = min(POLL_SECONDS, self._watch.scan_seconds) if self.is_polling else self._watch.scan_seconds
        return not self._scanned_at <= now < self._scanned_at + every  # also when the clock was set back

    def _scan(self, now: float, known: Known, found: list[Finished]) -> None:
        started = time.perf_counter()
        self._overflows_scanned, self._hints.too_many = self._overflows.total, False
        self._read_ignore_file()
        before = len(self._tracker)
        for relative, status in self._walk(""):
            self._note(relative, status, now, known, found)
        if self.scans_total:
            self.files_found_by_rescan += max(len(self._tracker) - before, 0)
        self._scanned_at, self.scans_total = now, self.scans_total + 1
        self.last_scan_seconds = time.perf_counter() - started

    def _read_ignore_file(self) -> None:
        try:
            lines = (self._library / IGNORE_FILE).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        self._is_ignored.set_rules(lines)

    def _walk(self, below: str) -> Iterator[tuple[str, os.stat_result]]:
        """(path, lstat) of everything below a directory that is no directory and not ignored; follows no link."""
        directories = [below]
        while directories:
            directory = directories.pop()
            try:
                entries = os.scandir(self._library / directory)
            except OSError:  # gone, or not to be read: the next scan looks again
                continue
            with entries:
                for entry in entries:
                    relative = f"{directory}/{entry.name}" if directory else entry.name
                    if Ignored.is_temporary(entry.name) or self._is_ignored.is_excluded(relative):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(relative)
                    elif status := _lstat(entry):
                        yield relative, status

    def _look_at_hints(self, now: float, known: Known, found: list[Finished]) -> None:
        for relative, is_complete in self._hints.take().items():
            self._look(relative, now, known, found, is_complete=is_complete)

    def _look(
        self, relative: str, now: float, known: Known, found: list[Finished], *, is_complete: bool = False
    ) -> None:
        try:
            status = os.lstat(f"{self._library}/{relative}")
        except (OSError, ValueError):
            self._tracker.lose(relative)
            return
        if stat.S_ISDIR(status.st_mode):  # a directory that came whole tells of itself alone
            for path, each in self._walk(relative):
                self._note(path, each, now, known, found)
        else:
            self._note(relative, status, now, known, found, is_complete=is_complete)

    def _note(
        self, relative: str, status: os.stat_result, now: float, known: Known, found: list[Finished], *,
        is_complete: bool = False,
    ) -> None:  # fmt: skip
        path = printable(relative)
        signature = Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        before = known(path)
        if stat.S_ISREG(status.st_mode):
            self._tracker.see(relative, signature, before, now, is_complete=is_complete)
        elif signature != before and all(each.path != path for each in found):  # a hint and the scan may both see it
            found.append(Finished(path=path, relative=relative, signature=signature, problem="not_a_file"))

    def _is_root_there(self) -> bool:
        """Compare the held directory with what the path names now, and take up watching again when it is back."""
        why = self._why_degraded()
        if why is None and self.degraded is not None:
            log.info("watching %s again", self._library)
            self._unlisten()
            self._listen()
            self.request_scan()
        elif why is not None and self.degraded is None:
            log.error("%s", why)
        self.degraded = why
        return why is None

    def _why_degraded(self) -> str | None:
        assert self._root is not None, "start() comes first"
        held = os.fstat(self._root)
        try:
            named = os.stat(self._library)  # noqa: PTH116 - beside os.fstat
        except OSError as error:
            return (
                f"{self._library}: {error.strerror}: the drop directory was deleted, renamed or unmounted; put it back"
            )
        if (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
            return None
        if held.st_nlink == 0:  # really deleted, and made anew: there is no old one to wait for
            self._hold()
            self._unlisten()
            self._listen()
            self.request_scan()
            return None
        return (
            f"{self._library} is another directory than the one that was watched (renamed, or its file system is not"
            " mounted): put the old one back, or restart eternad to use this one"
        )

    def _hold(self) -> None:
        if self._root is not None:
            os.close(self._root)
        self._root = os.open(self._library, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _is_listening(self) -> bool:
        """Whether events still come; an observer that has died is replaced."""
        if self.is_polling or (self._observer is not None and self._observer.is_alive()):
            return True
        log.warning("the observer of %s has stopped: a new one is started", self._library)
        self._unlisten()
        self._listen()
        return False

    def _listen(self) -> None:
        self.is_polling = sends_no_events(self._library)
        if self.is_polling:
            return
        observer = Observer()
        try:
            observer.schedule(self._hints, str(self._library), recursive=True, event_filter=_EVENTS)
            observer.start()
        except OSError as error:  # ENOSPC: fs.inotify.max_user_watches
            log.warning("no events from %s (%s): scanning every %g s", self._library, error.strerror, POLL_SECONDS)
            self.is_polling = True
            return
        self._observer = observer

    def _unlisten(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            observer.join(timeout=5)


def _lstat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except OSError:  # gone since it was listed
        return None
