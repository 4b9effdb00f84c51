"""The comparison that nobody sees: sampled requests are put to the live version and to its shadow, in the background.

Both are asked for their likeliest answer (`temperature` 0), whole and one after the other in random order, so that what
differs is the version and not chance or load. Players' own answers are never touched and never wait.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from daemon.gateway.answers import Refusal
from daemon.gateway.calls import Call
from daemon.gateway.split import is_copied
from daemon.gateway.table import Route, Target
from daemon.gateway.traffic import Comparison, Traffic
from daemon.gateway.upstream import UpstreamFailed

log = logging.getLogger("eternad.gateway")
SHADOWS_MAX = 32
"""Comparisons at once; further ones are skipped, and counted."""
GREEDY: dict[str, Any] = {"temperature": 0, "stream": False, "n": 1}
WORDS_MAX = 2000
Ask = Callable[[Call, Target, dict[str, Any]], Awaitable[tuple[int, bytes]]]
"""Puts a request, with other fields, to a version; status and whole body. Raises `Refusal` or `UpstreamFailed`."""


class Shadows:
    """The comparisons of one gateway."""

    def __init__(self, traffic: Traffic, ask: Ask) -> None:
        self._traffic, self._ask = traffic, ask
        self._running: set[asyncio.Task[None]] = set()

    def sample(self, call: Call, route: Route) -> None:
        """Begin a comparison if this request is one of those that are compared."""
        shadow = route.shadow
        if shadow is None or not is_copied(route):
            return
        if len(self._running) >= SHADOWS_MAX:
            self._traffic.lane(shadow.version).shadow_skipped += 1
            return
        task = asyncio.create_task(self._compare(call, route.targets[0], shadow))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compare(self, call: Call, stable: Target, shadow: Target) -> None:
        comparison = self._traffic.comparison(shadow.version, stable.version)
        answers: dict[str, tuple[int, str, float]] = {}
        for target in random.sample([stable, shadow], 2):
            answers[target.version] = await self._answer(call, target, is_shadow=target is shadow)
        record(comparison, answers[shadow.version], answers[stable.version])

    async def _answer(self, call: Call, target: Target, *, is_shadow: bool) -> tuple[int, str, float]:
        """Status (599: none), text and milliseconds."""
        lane, status, body = self._traffic.lane(target.version), 599, b""
        since = lane.enter()
        try:
            status, body = await self._ask(call, target, GREEDY)
        except (Refusal, UpstreamFailed) as error:
            log.info("shadow %s: %s", target.version, error)
        finally:
            lane.leave_background(is_good=status < 500 if is_shadow else None)
        return status, text_of(body), (time.perf_counter() - since) * 1e3


def record(comparison: Comparison, candidate: tuple[int, str, float], stable: tuple[int, str, float]) -> None:
    """Count one pair of (status, text, milliseconds); what both refuse is the client's own mistake."""
    if 400 <= candidate[0] < 500 and 400 <= stable[0] < 500:
        return
    for side, (status, _, ms) in ((comparison.candidate, candidate), (comparison.stable, stable)):
        if status >= 400:
            side.failed += 1
        else:
            side.answered += 1
            side.ms += ms
    if candidate[0] < 400 and stable[0] < 400:
        comparison.pairs += 1
        comparison.identical += candidate[1] == stable[1]
        comparison.divergence += divergence(candidate[1], stable[1])


class _Choice(msgspec.Struct):
    text: str | None = None
    message: dict[str, Any] | None = None


class _Said(msgspec.Struct):
    choices: list[_Choice]


def text_of(body: bytes) -> str:
    """What a completion or a chat completion says; nothing for what is neither."""
    try:
        choice = msgspec.json.decode(body, type=_Said).choices[0]
    except (msgspec.DecodeError, IndexError):
        return ""
    content = choice.text if choice.message is None else choice.message.get("content")
    return content if isinstance(content, str) else ""


def divergence(left: str, right: str) -> float:
    """The share of words that differ: 1 - Dice's coefficient of the two multisets; 0: the same, 1: nothing in common.

    In linear time, since it runs beside players' requests. L. R. Dice, Ecology 26 (1945).
    """
    a, b = (Counter(text.split(maxsplit=WORDS_MAX)[:WORDS_MAX]) for text in (left, right))
    total = a.total() + b.total()
    return 1 - 2 * (a & b).total() / total if total else 0.0
