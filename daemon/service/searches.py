"""Searches that the daemon begins by itself: one `eternad tune` at a time, in a child, beside the updates.

What is at work stands in the database, so a search that dies with the daemon is taken up again; none of its finished
trials is lost. What came out of it is for the operator (`policy = "ask"`) or written at once (`"apply"`).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from daemon.config import ConfigError
from daemon.service.house import House, log
from daemon.state import audit, runs
from daemon.state.database import set_setting, setting, transaction
from daemon.tuning import rules
from daemon.tuning.rules import Ended

COMMAND = [sys.executable, "-m", "daemon", "tune"]
NICENESS = 10
"""Updates and engines go first on a CPU."""
RUNS_LOOKED_AT = 50
STOP_SECONDS = 30.0


class Work(msgspec.Struct):
    """The search that is at work."""

    model: str
    child: subprocess.Popen[bytes]
    log: Path


class Searches:
    """Begins searches and reads their answers."""

    def __init__(self, house: House, config_path: Path, reload: Callable[[], object]) -> None:
        self._house, self._config_path, self._reload = house, config_path, reload
        self._work: Work | None = None

    def advance(self, now: float) -> None:
        """Follow the search at work, or begin one that is due. Never waits."""
        if self._work is not None:
            code = self._work.child.poll()
            if code is not None:
                self._end(self._work, code)
            return
        for name, model in self._house.config.models.items():
            left = setting(self._house.database, f"searching/{name}")
            reason = left or rules.is_due(model.tuning, self._ended(name), self._searched_at(name), now)
            if reason and not self._house.disk_is_low():
                return self._begin(name, reason, now)

    def stop(self) -> None:
        """The daemon ends; the search goes on at the next start."""
        if self._work is None:
            return
        self._work.child.send_signal(signal.SIGTERM)
        try:
            self._work.child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._work.child.pid, signal.SIGKILL)
            self._work.child.wait()
        self._work = None

    def _ended(self, name: str) -> list[Ended]:
        found = runs.recent(self._house.database, name, RUNS_LOOKED_AT)
        return [Ended(run.state, run.updated_at) for run in found if run.state not in runs.ACTIVE]

    def _searched_at(self, name: str) -> float:
        return float(setting(self._house.database, f"searched/{name}") or 0.0)

    def _begin(self, name: str, reason: str, now: float) -> None:
        path = self._house.config.state_directory / "tuning" / name / "search.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        policy = self._house.model(name).tuning.policy
        command = [*COMMAND, name, "--config", str(self._config_path), *(["--apply"] if policy == "apply" else [])]
        with path.open("ab") as output:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        os.setpriority(os.PRIO_PROCESS, child.pid, NICENESS)
        self._work = Work(name, child, path)
        with transaction(self._house.database) as connection:
            set_setting(connection, f"searching/{name}", reason)
            set_setting(connection, f"searched/{name}", repr(now))
            audit.write(connection, "search", name, {"reason": reason, "policy": policy})
        log.info("a search for better settings of %s begins (%s)", name, reason)

    def _end(self, work: Work, code: int) -> None:
        self._work = None
        with transaction(self._house.database) as connection:
            set_setting(connection, f"searching/{work.model}", "")
            audit.write(connection, "search_ended", work.model, {"status": code})
        if code:
            log.error("the search for %s ended with status %d; its last words: %s", work.model, code, _tail(work.log))
            return
        log.info("the search for %s has ended; see: eternad tune %s --accept", work.model, work.model)
        if work.model in self._house.config.models and self._house.model(work.model).tuning.policy == "apply":
            with suppress(ConfigError):  # it says so itself, and the configuration stays as it was
                self._reload()


def _tail(path: Path) -> str:
    lines = path.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "none"
