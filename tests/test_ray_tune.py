"""The search on a Ray cluster: `make test-ray`, where Ray is installed. Not part of the CI."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_kit import ROOT, Cluster
from test_search_command import place as place  # noqa: PLC0414 (a fixture)

from strategies import search as engine
from strategies.search import Search, Trial

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install 'eternad[ray]'"),
]
PROGRAM = """
import sys, threading
from functools import partial
from pathlib import Path
from ray_tune_kit import attempts
from test_search import SPACE, START
from strategies import ray_cluster, ray_tune
from strategies import search as engine
kind, sampler, directory = sys.argv[1:4]
search = engine.Search(directory=Path(directory), space=SPACE, start=START, sampler=sampler)
with engine.opened(search) as study, ray_cluster.joined():
    begin, trials = partial(attempts, kind, directory), int(sys.argv[4])
    # an event holds a lock: what watches this process must not be asked to travel
    ray_tune.run(search, study, begin, trials=trials, jobs=2, needed={"CPU": 1.0},
                 is_stopping=threading.Event().is_set, told=partial(print, threading.Lock()))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two raylets with one CPU each."""
    found = Cluster(1)
    try:
        found.add(1)
        yield found
    finally:
        found.close()


def start(cluster: Cluster, kind: str, sampler: str, directory: Path, trials: int) -> "subprocess.Popen[str]":
    """A search in a process of its own, as any that uses Ray."""
    command = [sys.executable, "-c", PROGRAM, kind, sampler, str(directory), str(trials)]
    return subprocess.Popen(
        command, cwd=ROOT, env=cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def ended(child: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit code, and what it said last."""
    said = child.communicate()[1]
    return child.returncode, said


def found(directory: Path) -> list[Trial]:
    """What the study remembers."""
    from test_search import SPACE, START

    given = Search(directory=directory, space=SPACE, start=START)
    with engine.opened(given) as study:
        return engine.finished(given, study)


@pytest.mark.parametrize(("sampler", "trials", "height"), [("grid", 25, 1.0), ("random", 60, 0.9), ("tpe", 40, 0.95)])
def test_the_planted_optimum_is_found_through_ray(
    cluster: Cluster, tmp_path: Path, sampler: str, trials: int, height: float
) -> None:
    """The same hill, samplers and study as in processes."""
    child = start(cluster, "hill", sampler, tmp_path, trials)
    code, said = ended(child)
    assert code == 0, said
    tried = found(tmp_path)
    best = engine.best(tried)
    assert len(tried) == trials and best is not None and best.value is not None and best.value >= height


def test_hopeless_and_unfit_trials_end_as_in_processes(cluster: Cluster, tmp_path: Path) -> None:
    """A loss far above the others' ends its trial before the end; values that cannot be trained are noted."""
    child = start(cluster, "picky", "random", tmp_path, 16)
    code, said = ended(child)
    assert code == 0, said
    tried = found(tmp_path)
    states = {trial.state for trial in tried}
    assert states == {"finished", "hopeless", "unfit"} and len(tried) == 16
    went_on = {int(path.name) for path in (tmp_path / "went-on").iterdir()}
    assert not went_on & {trial.number for trial in tried if trial.state == "hopeless"}


def test_what_no_setting_can_mend_ends_the_search_with_its_reason(cluster: Cluster, tmp_path: Path) -> None:
    """Not tried again and again on other nodes."""
    child = start(cluster, "broken", "random", tmp_path, 10)
    code, said = ended(child)
    assert "no base model" in said and code == 1


def test_a_search_killed_on_a_cluster_loses_no_finished_trial(cluster: Cluster, tmp_path: Path) -> None:
    """SIGKILL to the searching process; the next one goes on, here in processes: the study is the same."""
    child = start(cluster, "slow", "random", tmp_path, 30)
    deadline = time.monotonic() + 120
    while (tmp_path / "study.log").exists() is False or (tmp_path / "study.log").read_text().count("op_code") < 60:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    before = found(tmp_path)
    assert before
    code, said = ended(start(cluster, "hill", "random", tmp_path, len(before) + 3))
    assert code == 0, said
    assert found(tmp_path)[: len(before)] == before and len(found(tmp_path)) == len(before) + 3


def test_the_command_trains_its_trials_on_the_cluster(cluster: Cluster, place: Path) -> None:
    """`eternad tune --engine ray`: real trainers on two nodes, a proposal at the end, nothing left behind."""
    command = [sys.executable, "-m", "daemon", "tune", "npc", "--config", str(place / "eternad.toml"), "--json"]
    done = subprocess.run(
        [*command, "--engine", "ray", "--trials", "2", "--jobs", "2", "--sampler", "random"],
        cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert [trial["state"] for trial in result["trials"]] == ["finished", "finished"]
    (directory,) = (place / "state" / "tuning" / "npc").iterdir()
    assert not (directory / "work").exists() or not list((directory / "work").iterdir())
