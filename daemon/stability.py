"""When is a dropped file finished? Decided from what it looked like when, apart from any file system."""

from collections.abc import Callable, Iterable

import msgspec

from daemon.drop_names import printable
from daemon.state.files import Finished, Signature

RETRY_SECONDS, RETRY_SECONDS_MAX = 5.0, 300.0
Known = Callable[[str], Signature | None]
"""The signature under which the file of a printable path was taken in or refused."""


class _Sighting(msgspec.Struct):
    """A file that waits to become finished, or that has been handed over and not been taken in yet."""

    relative: str
    signature: Signature
    since: float
    """Unchanged since then."""
    first: float
    known: Signature | None
    is_complete: bool
    handed: float | None = None
    attempts: int = 0


class StabilityTracker:
    """A file is finished when nothing about it has changed for `stability_seconds`.

    One that was handed over and is not known afterwards comes again, for as long as it exists: at once when some of it
    was taken in, with back-off when nothing was.
    """

    def __init__(self, stability_seconds: float, never_stable_seconds: float) -> None:
        self._stability, self._never = stability_seconds, never_stable_seconds
        self._sightings: dict[str, _Sighting] = {}
        self._awaited: set[str] = set()

    def __len__(self) -> int:
        return len(self._sightings)

    def see(
        self, relative: str, signature: Signature, known: Signature | None, now: float, *, is_complete: bool = False
    ) -> bool:
        """Note what a file looks like now; one that is known like this is let go. True when it was not waiting yet.

        `is_complete`: it was renamed from a temporary name, so nobody writes to it any more.
        """
        if signature == known:
            self.lose(relative)
            return False
        seen = self._sightings.get(relative)
        if seen is None:
            self._sightings[relative] = _Sighting(relative, signature, now, now, known, is_complete)
            return True
        seen.is_complete |= is_complete
        if seen.signature != signature:
            seen.signature, seen.since, seen.known, seen.handed, seen.attempts = signature, now, known, None, 0
        elif seen.known != known:  # some of it was taken in
            seen.known, seen.handed, seen.attempts = known, None, 0
        return False

    def expect(self, paths: Iterable[str]) -> None:
        """Files of a batch: whether they are complete is told by their hash."""
        self._awaited.update(paths)

    def again(self, relative: str) -> None:
        """Some of a file was taken in, and more of it waits: it is due at once."""
        seen = self._sightings.get(relative)
        if seen is not None:
            seen.handed, seen.attempts = None, 0

    def lose(self, relative: str) -> None:
        """The file is gone, or known."""
        self._awaited.discard(relative)
        self._sightings.pop(relative, None)

    def due(self, now: float) -> list[str]:
        """Those that must be looked at (`see`) and then asked for (`finished`) now."""
        return [each.relative for each in self._sightings.values() if now >= self._due_at(each, now)]

    def finished(self, relative: str, now: float) -> Finished | None:
        """Hand a file over if it is finished, or as `never_stable` when it has kept changing for too long."""
        seen = self._sightings.get(relative)
        if seen is None:
            return None
        is_due = now >= self._due_at(seen, now)
        if not is_due and (seen.handed is not None or now - seen.first < self._never):
            return None
        seen.attempts += seen.handed is not None
        seen.handed = now
        if not is_due:
            seen.first = now  # told again after as long a time, not at every change
        problem = "" if is_due else "never_stable"
        return Finished(path=printable(relative), relative=relative, signature=seen.signature, problem=problem)

    def _due_at(self, seen: _Sighting, now: float) -> float:
        seen.since, seen.first = min(seen.since, now), min(seen.first, now)  # the clock was set back
        if seen.handed is not None:
            return min(seen.handed, now) + min(RETRY_SECONDS * 2.0**seen.attempts, RETRY_SECONDS_MAX)
        # a line of a feedback file that has its end is finished, and so is a file renamed from a temporary name; a torn
        # manifest waits for its end, and a file of a batch for its hash
        is_fast = seen.is_complete or seen.relative.startswith("feedback/") or seen.relative.endswith(".batch.json")
        is_fast = is_fast or seen.relative in self._awaited
        return seen.since + (0.0 if is_fast else self._stability)
