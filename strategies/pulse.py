"""A run's signs of life: `progress.json`, the wall time of each phase, and the order to stop."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal

from strategies.parallel.contract import Backend
from strategies.request import Progress, write

Phase = Literal["load", "baseline", "train", "fisher", "evaluate", "save"]
SECONDS_BETWEEN = 0.2
"""`progress.json` is replaced at most this often, but at every change of phase and after the last step."""


class Interrupted(Exception):
    """SIGTERM was received; what can be resumed is on disk."""


class Pulse:
    """Writes `progress.json` in a run's directory."""

    def __init__(self, run_directory: Path) -> None:
        self.path = run_directory / "progress.json"
        self.writes = True
        """Whether this process speaks for the run."""
        self._agree: Callable[[bool], list[bool]] = lambda flag: [flag]
        self.seconds: dict[str, float] = {}
        """Wall time by phase."""
        self.is_told_to_stop = False
        self._began = self._entered = time.monotonic()
        self._phase: Phase | None = None
        self._step = self._steps = 0
        self._announced = 0.0

    def join(self, backend: Backend) -> None:
        """Several processes: the first one writes, and all leave together or not at all."""
        self.writes, self._agree = backend.rank == 0, backend.any

    def listen(self) -> None:
        """From now on SIGTERM only sets a flag."""
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.is_told_to_stop = True

    def check(self) -> None:
        """Raises `Interrupted` when the run has been told to stop."""
        if self._agree(self.is_told_to_stop)[0]:
            raise Interrupted

    def enter(self, phase: Phase) -> None:
        """The phase before is over, this one begins; raises `Interrupted` when the run has been told to stop."""
        self._close()
        self.check()
        self._phase = phase
        self._announce()

    def finish(self) -> dict[str, float]:
        """Wall time by phase, and `total`."""
        self._close()
        return {**self.seconds, "total": time.monotonic() - self._began}

    def _close(self) -> None:
        now = time.monotonic()
        if self._phase is not None:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._entered
        self._entered = now

    def step(self, step: int, steps: int, epoch: float, loss: float, tokens_per_second: float, eta: float) -> None:
        """After an optimiser step."""
        self._step, self._steps = step, steps
        if step == steps or time.monotonic() - self._announced >= SECONDS_BETWEEN:
            self._announce(epoch=epoch, loss=loss, tokens_per_second=tokens_per_second, eta_seconds=eta)

    def _announce(
        self,
        epoch: float = 0.0,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        eta_seconds: float | None = None,
    ) -> None:
        if not self.writes:
            return
        write(
            self.path,
            Progress(
                phase=self._phase or "load", step=self._step, steps=self._steps, epoch=epoch, loss=loss,
                tokens_per_second=tokens_per_second, eta_seconds=eta_seconds, at=time.time(),
            ),
        )  # fmt: skip
        self._announced = time.monotonic()
