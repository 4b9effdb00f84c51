"""What the soak drops: feedback at a steady rate, in files that are rotated and removed as a game server would."""

import json
import time
from pathlib import Path

ROTATE_SECONDS, KEEP_SECONDS = 300.0, 900.0
LEARNED_EVERY = 250
"""Such a record is a thumb or a demonstration; the others are telemetry (`float`): stored and never trained on."""
FIRST_NUMBER = 1_000_000
"""Seven digits in every text from the beginning: they make the daemon look for phone numbers, and load what does."""


def record(number: int, now: float) -> dict[str, object]:
    """Record `number` of the soak: new text, a new id, a new subject now and then."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    tree: dict[str, object] = {
        "schema": "eternad.feedback/1", "id": _uuid7(number, now), "ts": moment, "model": "npc",
        "subject": {"id": f"h:player-{number // 500:08d}"}, "inference": {"id": f"inf-{number}"},
        "source": {"app": "soak", "channel": "hall", "reporter": "player"},
        "input": {"messages": [{"role": "user", "content": f"Where is door {number}?"}]},
    }  # fmt: skip
    if number % LEARNED_EVERY:
        return {**tree, "kind": "float", "metric": "engagement", "value": number % 97 / 97}
    answer = {"messages": [{"role": "assistant", "content": f"In hall {number // 7}."}]}
    if number // LEARNED_EVERY % 3:
        return {**tree, "kind": "demonstration", "value": f"In hall {number // 7}."}
    return {**tree, "kind": "boolean", "metric": "thumb", "value": bool(number // 7 % 3), "output": answer}


def _uuid7(number: int, now: float) -> str:
    """RFC 9562, 5.7: the time in milliseconds, then what makes it unique."""
    return f"{int(now * 1e3):012x}"[:8] + f"-{int(now * 1e3) & 0xFFFF:04x}-7000-8000-{number:012x}"


class Feed:
    """One game server: appends to its current file, begins a new one every five minutes, removes those long read."""

    def __init__(self, library: Path, rate: float) -> None:
        self._directory, self._rate = library / "feedback" / "npc" / "game", rate
        self._directory.mkdir(parents=True)
        self._began = time.monotonic()
        self._opened: list[tuple[float, Path]] = []
        self.written = 0

    def top_up(self) -> None:
        """Append what the rate asks for since the last call, in one write."""
        elapsed = time.monotonic() - self._began
        wanted = int(elapsed * self._rate)
        now = time.time()
        numbers = range(FIRST_NUMBER + self.written, FIRST_NUMBER + wanted)
        lines = [json.dumps(record(number, now)) for number in numbers]
        if lines:
            with self._current(elapsed).open("a") as file:
                file.write("\n".join(lines) + "\n")
        self.written = wanted

    def _current(self, elapsed: float) -> Path:
        if not self._opened or elapsed - self._opened[-1][0] >= ROTATE_SECONDS:
            self._opened.append((elapsed, self._directory / f"events-{int(elapsed):06d}.jsonl"))
        while self._opened[0][0] < elapsed - KEEP_SECONDS - ROTATE_SECONDS:
            self._opened.pop(0)[1].unlink()
        return self._opened[-1][1]
