"""The search: planted optima are found, killed searches go on, hopeless trials end early, a missing extra is named."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from strategies import search as engine
from strategies.catalog import Ewc, OLora, Replay
from strategies.objective import Score, is_dominated, score_of, weighted
from strategies.request import Evaluation, Lora, Measure, Shift, Training
from strategies.search import MissingExtra, Sampler, Search, Trial, Unfit, Watch
from strategies.space import Parameter, Settings, Values, space_of, values_of, with_values

ROOT = Path(__file__).resolve().parent.parent
SPACE = [
    Parameter(name="x", kind="float", low=-4.0, high=4.0, grid=[-4.0, -2.0, 0.0, 2.0, 4.0]),
    Parameter(name="rate", kind="float", low=1e-5, high=1e-1, log=True, grid=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
]
START = {"x": -4.0, "rate": 1e-1}


def hill(number: int, values: Values, watch: Watch) -> Score:
    """One summit of height 1 at x = 2, rate = 1e-3."""
    distance = ((values["x"] - 2.0) / 4) ** 2 + (math.log10(values["rate"] / 1e-3) / 2) ** 2
    return Score(gain=1 - distance, rise=0.0, drift=0.0)


def searched(
    directory: Path, attempt: engine.Try = hill, trials: int = 20, **fields: object
) -> tuple[Search, list[Trial]]:
    """A search from its beginning or where it stood, and all its trials."""
    search = Search(directory=directory, space=SPACE, start=START, **fields)  # type: ignore[arg-type]
    with engine.opened(search) as study:
        engine.run(search, study, attempt, trials=trials)
        return search, engine.finished(search, study)


@pytest.mark.parametrize(
    ("sampler", "trials", "height"), [("grid", 40, 1.0), ("random", 150, 0.97), ("tpe", 60, 0.97), ("gp", 25, 0.99)]
)
def test_every_sampler_finds_the_planted_optimum(tmp_path: Path, sampler: Sampler, trials: int, height: float) -> None:
    """A hill with one summit, begun at its foot; the grid ends when it has been walked over."""
    if sampler == "gp":
        pytest.importorskip("scipy", reason="the GP sampler needs scipy, which is not part of the extra")
    _, found = searched(tmp_path, trials=trials, sampler=sampler)
    best = engine.best(found)
    assert best is not None and best.value is not None and best.value >= height
    assert found[0].values == START
    assert len(found) == (25 if sampler == "grid" else trials)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_front_holds_the_trade_offs(tmp_path: Path, sampler: Sampler) -> None:
    """Gain bought with forgetting: no point of the front is beaten, and what is only worse is not on it.

    Two at a time; what matters is said of all three at once.
    """

    def trade(number: int, values: Values, watch: Watch) -> Score:
        waste = abs(values["rate"])  # nothing is bought with it
        return Score(gain=values["x"] - 10 * waste, rise=max(values["x"], 0.0), drift=10 * waste)

    search = Search(directory=tmp_path, space=SPACE, start=START, sampler=sampler, pareto=True)
    with engine.opened(search) as study:
        engine.run(search, study, trade, trials=40, jobs=2)
        found = engine.finished(search, study)
        assert set(engine.importance(search, study)) == set(START)
    assert len(found) == 40
    front = engine.front(found)
    scores = [trial.score for trial in found if trial.score is not None]
    assert 1 < len(front) < len(found)
    assert all(trial.score is not None and not is_dominated(trial.score, scores) for trial in front)
    assert max(trial.score.gain for trial in front if trial.score) == max(score.gain for score in scores)


def test_importance_names_what_matters(tmp_path: Path) -> None:
    """A parameter that changes nothing gets the smaller share; few trials give none."""

    def only_x(number: int, values: Values, watch: Watch) -> Score:
        return Score(gain=-((values["x"] - 2.0) ** 2), rise=0.0, drift=0.0)

    search, _ = searched(tmp_path, only_x, trials=60, sampler="random")
    with engine.opened(search) as study:
        shares = engine.importance(search, study)
    assert shares["x"] > 0.7 and sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
    few, _ = searched(tmp_path / "few", only_x, trials=3, sampler="random")
    with engine.opened(few) as study:
        assert engine.importance(few, study) == {}


def test_a_search_goes_on_where_it_stood(tmp_path: Path) -> None:
    """`trials` counts in all: a second call with as many does nothing, with more only the rest."""
    calls: list[int] = []

    def counted(number: int, values: Values, watch: Watch) -> Score:
        calls.append(number)
        return hill(number, values, watch)

    searched(tmp_path, counted, trials=5)
    _, found = searched(tmp_path, counted, trials=5)
    assert (len(calls), len(found)) == (5, 5)
    searched(tmp_path, counted, trials=8)
    assert calls == list(range(8))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_that_goes_on_draws_new_values(tmp_path: Path, sampler: Sampler) -> None:
    """Not those of its beginning again, which its seed gave; what is begun anew elsewhere is drawn as before."""
    for trials in (3, 6, 9):
        _, found = searched(tmp_path / "here", trials=trials, sampler=sampler)
    assert len({trial.values["x"] for trial in found}) == 9
    _, again = searched(tmp_path / "there", trials=3, sampler=sampler)
    assert [trial.values for trial in again] == [trial.values for trial in found[:3]]


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_an_interrupted_trial_is_no_result(tmp_path: Path, sampler: Sampler) -> None:
    """Ctrl-C in the first trial: what is configured is still tried, and every point of a grid is."""

    def interrupted(number: int, values: Values, watch: Watch) -> Score:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path, interrupted, sampler=sampler)
    _, found = searched(tmp_path, trials=25, sampler=sampler)
    assert START in [trial.values for trial in found] and len(found) == 25
    if sampler == "grid":
        assert len({tuple(trial.values.values()) for trial in found}) == 25


def test_unfit_values_do_not_end_a_search_but_a_broken_one_does(tmp_path: Path) -> None:
    """A diverged trial is noted with its reason; an error that no value can mend is raised."""

    def picky(number: int, values: Values, watch: Watch) -> Score:
        if values["x"] < 0:
            raise Unfit("the loss is not finite")
        return hill(number, values, watch)

    _, found = searched(tmp_path, picky, trials=10, sampler="random")
    unfit = [trial for trial in found if trial.state == "unfit"]
    assert unfit and all(trial.reason == "the loss is not finite" and trial.score is None for trial in unfit)

    def broken(number: int, values: Values, watch: Watch) -> Score:
        raise RuntimeError("no base model")

    with pytest.raises(RuntimeError, match="no base model"):
        searched(tmp_path / "other", broken)


@pytest.mark.parametrize("pareto", [False, True])
def test_hopeless_trials_end_early(tmp_path: Path, pareto: bool) -> None:
    """Far above the median of enough others at the same point; the rest of the training never happens."""
    ended: list[int] = []

    def slow(number: int, values: Values, watch: Watch) -> Score:
        watch("1:1", 5.0 if number == 6 else 1.0 + 0.01 * number)
        ended.append(number)
        return hill(number, values, watch)

    _, found = searched(tmp_path, slow, trials=8, pareto=pareto)
    assert [trial.number for trial in found if trial.state == "hopeless"] == [6] and 6 not in ended
    assert "median" in found[6].reason


@pytest.mark.parametrize(
    ("loss", "others", "hopeless"),
    [(9.0, [1.0] * 3, False), (9.0, [1.0] * 4, True), (1.4, [1.0] * 4, False), (float("nan"), [1.0] * 4, True)],
)
def test_what_is_hopeless(loss: float, others: list[float], hopeless: bool) -> None:
    """Only with enough others, and only by more than the noise of batches."""
    assert engine.is_hopeless(loss, others) is hopeless


SLOW = """
import sys, time
from pathlib import Path
from test_search import SPACE, START, hill
from strategies import search as engine
search = engine.Search(directory=Path(sys.argv[1]), space=SPACE, start=START, sampler="random")
def attempt(number, values, watch):
    if number == 3:
        Path(sys.argv[1], "third").touch()
        time.sleep(60)
    return hill(number, values, watch)
with engine.opened(search) as study:
    engine.run(search, study, attempt, trials=6)
"""


def test_a_killed_search_loses_no_finished_trial(tmp_path: Path) -> None:
    """SIGKILL in mid-trial, a torn last line and a stale lock: three are kept, the fourth is tried again."""
    place = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], env=place)
    wait(lambda: (tmp_path / "third").exists())
    with pytest.raises(engine.SearchBusy, match="another search"), engine.opened(_search(tmp_path)):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    with (tmp_path / "study.log").open("ab") as log:
        log.write(b'{"op_code": 6, "torn')
    (tmp_path / "study.log.lock").touch()
    with engine.opened(_search(tmp_path)) as study:
        before = engine.finished(_search(tmp_path), study)
        (killed,) = [dict(trial.params) for trial in study.trials if trial.number == 3]
    _, after = searched(tmp_path, trials=6, sampler="random")
    assert len(before) == 3 and after[:3] == before and len(after) == 6
    assert after[3].number == 4 and after[3].values["x"] == pytest.approx(killed["x"], rel=1e-2)


def _search(directory: Path) -> Search:
    return Search(directory=directory, space=SPACE, start=START, sampler="random")


def wait(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def test_a_missing_extra_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, before anything is written."""
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"needs optuna, not installed here: pip install 'eternad\[tune\]'$"):
        searched(tmp_path / "never")
    with pytest.raises(MissingExtra, match=r"pip install 'eternad\[tune\]' scipy$"):
        engine.require("gp")
    assert not (tmp_path / "never" / "study.log").exists()


SETTINGS = Settings(
    lora=Lora(rank=16, alpha=32.0), training=Training(learning_rate=2e-4), strategies=[Replay(0.3), Ewc(strength=1e4)]
)


def test_the_space_is_made_of_what_is_configured() -> None:
    """Strengths of strategies that the model has, bounds that hold its own values, no rank where slices divide it."""
    space = {each.name: each for each in space_of(SETTINGS)}
    assert {"training.learning_rate", "training.epochs", "lora.rank", "replay.ratio", "ewc.strength"} <= set(space)
    assert "distill.strength" not in space
    assert space["ewc.strength"].high == 1e4 and space["training.learning_rate"].log
    sliced = space_of(Settings(lora=Lora(), training=Training(), strategies=[OLora()]))
    assert "lora.rank" not in {each.name for each in sliced}
    off = {each.name: each for each in space_of(Settings(lora=Lora(), training=Training(), strategies=[Ewc(0.0)]))}
    assert off["ewc.strength"].low == 0.0 and not off["ewc.strength"].log


def test_values_go_into_the_settings_and_out_again() -> None:
    """Each at its place, whole numbers whole; alpha follows the rank; the rest stays."""
    values = {"training.learning_rate": 1e-3, "lora.rank": 4, "ewc.strength": 3.0}
    changed = with_values(SETTINGS, values)
    assert values_of(changed, list(values)) == values
    assert changed.lora.alpha == 8.0
    assert changed.training.epochs == SETTINGS.training.epochs and changed.strategies[0] == Replay(0.3)


def _shift(change: float, examples: int = 10) -> Shift:
    level = Measure(mean=1.0, low=1.0, high=1.0, examples=examples)
    return Shift(
        base=level, before=level, after=level, change=Measure(mean=change, low=change, high=change, examples=examples)
    )


def test_a_score_weighs_gain_against_forgetting_and_drift() -> None:
    """A fall on the old is no merit; hold-outs weigh by their examples; without a new hold-out there is no score."""
    drift = Measure(mean=0.5, low=0.5, high=0.5, examples=4)
    evaluation = Evaluation(new=_shift(-0.8), old={"1": _shift(0.4, 30), "2": _shift(0.0, 10)}, drift_base=drift)
    score = score_of(evaluation)
    assert score == Score(gain=0.8, rise=pytest.approx(0.3), drift=0.5)
    weights = engine.Weights(old=1.0, drift=0.1, old_max=0.5, drift_max=0.6)
    assert weighted(score, weights) == pytest.approx(0.8 - 0.3 - 0.05)
    bought = Score(gain=8.0, rise=0.0, drift=5.0)  # the gate would not let it pass
    assert weighted(bought, weights) < weighted(score, weights)
    improved = score_of(Evaluation(new=_shift(-0.1), old={"1": _shift(-0.2)}))
    assert improved is not None and improved.rise == 0.0
    assert score_of(Evaluation(new=None)) is None
