"""The same search on a Ray cluster: Ray Tune places the trials, Optuna's study says what to try and what is hopeless.

The study stays the only record, so a search may begin in processes, go on through Ray, and be killed at any moment:
what Ray itself keeps is thrown away at the end. Every node must see the state directory, the base model and this
program at the same paths.
"""

import threading
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
from ray import tune
from ray.tune import Stopper, Trainable
from ray.tune.search import Searcher

from strategies import ray_cluster, search
from strategies.objective import Score
from strategies.search import Search, Trial, Try, Unfit

if TYPE_CHECKING:
    import optuna

Begin = Callable[[], tuple[Try, Callable[[], None]]]
"""Called on a node: how a trial is tried there, and what ends it. Travels to the node by its name and arguments."""
ATTEMPTS = 2
"""A trial whose node is lost is tried again so often, from its beginning."""


class Broken(Exception):
    """No setting can mend it: the search ends with this reason."""


class Attempt(Trainable):
    """One trial on a node: a thread that trains, and a report at every point that it passes."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin at once."""
        attempt, self._stop = config["begin"]()
        self._said: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._thread = threading.Thread(target=self._try, args=(attempt, config, self._said), daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """The next report, as soon as there is one."""
        return self._said.get()

    def cleanup(self) -> None:
        """The trainer ends with the trial."""
        self._stop()
        self._thread.join()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process: another would spend ten seconds on its imports."""
        self.cleanup()
        self.setup(new_config)
        return True

    @staticmethod
    def _try(attempt: Try, config: dict[str, Any], said: "SimpleQueue[dict[str, Any]]") -> None:
        def watch(point: str, loss: float) -> None:
            said.put({"point": point, "loss": loss})

        try:
            score = attempt(config["number"], config["values"], watch)
            said.put({"score": msgspec.json.encode(score).decode(), "done": True})
        except Unfit as unfit:
            said.put({"unfit": str(unfit), "done": True})
        except Exception as error:  # whatever it is, the one who searches must hear of it
            said.put({"broken": str(error) or repr(error), "done": True})


class Proposals(Searcher):
    """Ray asks what to try and tells what became of it; the study answers and remembers."""

    def __init__(self, given: Search, study: "optuna.Study", begin: Begin, trials: int) -> None:
        super().__init__()  # no metric: the study judges
        self.given, self.study, self.begin, self.left = given, study, begin, trials
        self.told: Callable[[Trial], None] = lambda _: None
        self.broken = ""
        """Why the search must end."""
        self._open: dict[str, optuna.Trial] = {}
        self._began: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles it for a `Tuner.restore` that nobody calls; whom it tells belongs to this process."""
        return {name: value for name, value in self.__dict__.items() if name != "told"}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The values of the next trial; `FINISHED` when all have been proposed."""
        if not self.left:
            return str(Searcher.FINISHED)
        self.left -= 1
        self._open[trial_id] = trial = self.study.ask()
        self._began[trial_id] = time.monotonic()
        return {"begin": self.begin, "number": trial.number, "values": search.proposed(self.given, trial)}

    def is_hopeless(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """A point was passed: whether the trial is to go on."""
        import optuna

        if "point" not in result or trial_id not in self._open:
            return False
        try:
            search.compare_loss(self.study, self._open[trial_id], result["point"], result["loss"])
        except optuna.TrialPruned:
            self._close(trial_id, "PRUNED")
            return True
        return False

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended, by itself or because it was hopeless; without a result its node was lost for good."""
        found = result or {}
        if trial_id not in self._open:
            return
        if error or "broken" in found:
            self.broken = found.get("broken") or f"a trial was lost {ATTEMPTS + 1} times"
        if "score" in found:
            value = search.worth(self.given, self._open[trial_id], msgspec.json.decode(found["score"], type=Score))
            return self._close(trial_id, "COMPLETE", value)
        if "unfit" in found:
            self._open[trial_id].set_user_attr("reason", found["unfit"])
        self._close(trial_id, "FAIL")

    def _close(self, trial_id: str, state: str, value: Any = None) -> None:
        import optuna

        trial = self._open.pop(trial_id)
        trial.set_user_attr("seconds", round(time.monotonic() - self._began.pop(trial_id), 3))
        frozen = self.study.tell(trial, value, state=optuna.trial.TrialState[state])
        if state != "FAIL" or "reason" in frozen.user_attrs:
            self.told(search.outcome(self.given, frozen))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


class Ending(Stopper):
    """When a trial ends early, and when all of them do."""

    def __init__(self, proposals: Proposals, room: ray_cluster.Room, is_stopping: Callable[[], bool]) -> None:
        self._proposals, self._room, self._is_stopping = proposals, room, is_stopping

    def __getstate__(self) -> dict[str, Any]:
        """As of `Proposals`: the event of a process stays in it."""
        return {name: value for name, value in self.__dict__.items() if name != "_is_stopping"}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this trial is hopeless."""
        return self._proposals.is_hopeless(trial_id, result)

    def stop_all(self) -> bool:
        """Told to stop, broken for good, or without a cluster that could hold a trial."""
        self._proposals.broken = self._proposals.broken or self._room.shortage()
        return bool(self._proposals.broken) or self._is_stopping()


def run(
    given: Search, study: "optuna.Study", begin: Begin, *, trials: int, jobs: int, needed: Mapping[str, float],
    is_stopping: Callable[[], bool] = lambda: False, told: Callable[[Trial], None] = lambda _: None,
) -> None:  # fmt: skip
    """As `search.run`, on a cluster: `jobs` trials at a time, each with `needed` (`CPU`, `GPU`) on one node.

    Raises `Broken`; returns early when `is_stopping`. The process must have joined a cluster.
    """
    left = search.propose(given, study, trials - len(search.finished(given, study)))
    if left <= 0:
        return
    proposals = Proposals(given, study, begin, left)
    proposals.told = told
    tuner = tune.Tuner(
        tune.with_resources(Attempt, dict(needed)),
        tune_config=tune.TuneConfig(
            search_alg=proposals, num_samples=left, max_concurrent_trials=jobs, reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(given.directory / "work"), verbose=0,
            stop=Ending(proposals, ray_cluster.Room(needed), is_stopping),
            failure_config=tune.FailureConfig(max_failures=ATTEMPTS),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )  # fmt: skip
    lost = [str(error).strip().splitlines()[-1] for error in tuner.fit().errors]
    if lost or proposals.broken:
        raise Broken("; ".join(lost) or proposals.broken)
