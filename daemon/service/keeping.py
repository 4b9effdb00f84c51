"""Keeps the state directory and the process from growing: removes what `daemon.retention` finds, gives memory back."""

from daemon import retention
from daemon.engines.contract import EngineRefused, EngineUnavailable
from daemon.machine import memory
from daemon.retention import Removal
from daemon.service.house import House, log
from daemon.service.serving import Serving
from daemon.state import runs
from daemon.state.database import transaction

SWEEP_SECONDS = 3600.0
TRIM_SECONDS = 60.0


class Keeping:
    """Sweeps once an hour, and when an operator asks; gives free memory back once a minute."""

    def __init__(self, house: House, serving: Serving) -> None:
        self._house, self._serving, self._next, self._next_trim = house, serving, 0.0, 0.0

    def plan(self) -> list[Removal]:
        """What may go now. A model whose engine does not say what it has loaded keeps all its versions."""
        every = runs.versions(self._house.database)
        removals = retention.leftovers(self._house.versions, every) if not runs.active(self._house.database) else []
        for name, model in self._house.config.models.items():
            searches = self._house.config.state_directory / "tuning" / name
            removals += retention.old_searches(searches, model.tuning.searches_kept)
            try:
                listed = [*self._serving.listed(name), *self._serving.kept(name)]
            except (EngineUnavailable, EngineRefused) as error:
                log.warning("old versions of %s are kept: %s", name, error)
                continue
            own = [version for version in every if version.model == name]
            directory = self._house.versions / name
            removals += retention.old_versions(directory, own, model.versions_kept, listed)
        return removals + retention.old_runs(self._house.runs, runs.recent(self._house.database, limit=-1))

    def sweep(self, now: float) -> None:
        """Files once an hour, memory once a minute."""
        if not self._next_trim - TRIM_SECONDS <= now < self._next_trim:
            self._next_trim = now + TRIM_SECONDS
            memory.give_back()
        if not self._next - SWEEP_SECONDS <= now < self._next:  # also when the clock was set back
            self._next = now + SWEEP_SECONDS
            self.carry_out(self.plan())

    def carry_out(self, removals: list[Removal]) -> int:
        """Remove; the row of a version says so before its files are gone. Returns the bytes that were freed."""
        freed = 0
        for removal in removals:
            if removal.version is not None:
                with transaction(self._house.database) as connection:
                    runs.set_version_state(connection, *removal.version, "removed")
            freed += retention.remove(removal)
            log.info("removed %s (%s)", removal.path, removal.why)
        return freed
