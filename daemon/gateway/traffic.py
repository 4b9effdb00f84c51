"""What runs on each version, and how it has gone: for draining, and for the verdict on a canary."""

import asyncio
import time
from collections import deque
from typing import Literal

import msgspec

REMEMBERED = 1000
Ending = Literal["answered", "failed", "cancelled"]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """How a version has done since the gateway's start."""

    version: str
    inflight: int
    answered: int
    """With a status below 500, to the last byte."""
    failed: int
    """5xx, no connection, or broken off; after the retry."""
    cancelled: int
    """The client went away."""
    shadowed: int
    """Copies answered in the shadow; they are in none of the numbers above."""
    shadow_failed: int
    shadow_skipped: int
    """Copies that were not made because too many ran."""
    first_byte_ms: dict[str, float]
    """p50 and p95 of the last 1000 answers, and their `count`."""


class Lane:
    """One version's numbers."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.inflight = 0
        self.answered = self.failed = self.cancelled = 0
        self.shadowed = self.shadow_failed = self.shadow_skipped = 0
        self._first_bytes: deque[float] = deque(maxlen=REMEMBERED)
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> float:
        """A request is admitted; gives the time, to be handed to `first_byte`."""
        self.inflight += 1
        self._idle.clear()
        return time.perf_counter()

    def first_byte(self, since: float) -> None:
        """The answer begins."""
        self._first_bytes.append(time.perf_counter() - since)

    def leave(self, ending: Ending) -> None:
        """A request has ended."""
        self.inflight -= 1
        if ending == "answered":
            self.answered += 1
        elif ending == "failed":
            self.failed += 1
        else:
            self.cancelled += 1
        self._settle()

    def leave_background(self, *, is_good: bool | None) -> None:
        """A copy has ended; None: that of the version which the shadow is compared with, counted nowhere here."""
        self.inflight -= 1
        self.shadowed += is_good is True
        self.shadow_failed += is_good is False
        self._settle()

    def _settle(self) -> None:
        if self.inflight == 0:
            self._idle.set()

    async def drained(self, seconds: float) -> bool:
        """Wait until nothing runs on it, for so long at most."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def summary(self) -> Summary:
        """The numbers now."""
        times = sorted(self._first_bytes)
        quantiles = {f"p{q}": round(times[len(times) * q // 100] * 1e3, 3) for q in (50, 95)} if times else {}
        return Summary(
            version=self.version, inflight=self.inflight, answered=self.answered, failed=self.failed,
            cancelled=self.cancelled, shadowed=self.shadowed, shadow_failed=self.shadow_failed,
            shadow_skipped=self.shadow_skipped, first_byte_ms={**quantiles, "count": len(times)},
        )  # fmt: skip


class Side(msgspec.Struct):
    """One version's part in a comparison."""

    answered: int = 0
    failed: int = 0
    """A status above 399, or none."""
    ms: float = 0.0
    """Milliseconds until the last byte, the sum over what was answered."""


class Comparison(msgspec.Struct):
    """A shadow's answers against those of the version that is asked first, since they began to be compared."""

    against: str
    candidate: Side = msgspec.field(default_factory=Side)
    stable: Side = msgspec.field(default_factory=Side)
    pairs: int = 0
    """Both answered."""
    identical: int = 0
    divergence: float = 0.0
    """The sum over all pairs of the share of words that differ."""


class Traffic:
    """All versions that requests have gone to."""

    def __init__(self) -> None:
        self.lanes: dict[str, Lane] = {}
        self.comparisons: dict[str, Comparison] = {}
        """By the shadow's version."""

    def comparison(self, version: str, against: str) -> Comparison:
        """A shadow's, from zero if it is compared with another version than before."""
        found = self.comparisons.get(version)
        if found is None or found.against != against:
            found = self.comparisons[version] = Comparison(against=against)
        return found

    def lane(self, version: str) -> Lane:
        """The version's numbers, from zero if it is new."""
        found = self.lanes.get(version)
        if found is None:
            found = self.lanes[version] = Lane(version)
        return found

    def inflight(self) -> dict[str, int]:
        """{version: requests that run on it now}, shadow copies included."""
        return {lane.version: lane.inflight for lane in self.lanes.values()}

    def forget(self, named: set[str]) -> None:
        """Drop the numbers of versions that no alias names and on which nothing runs."""
        self.lanes = {key: lane for key, lane in self.lanes.items() if lane.inflight or key in named}
        self.comparisons = {key: each for key, each in self.comparisons.items() if key in named}
