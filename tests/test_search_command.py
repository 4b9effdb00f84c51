"""`eternad tune`: real trainers on a model's past, stopped and taken up again, and the change that it proposes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from buffers import claims, journal, rehearsal
from buffers.example import Example, Origin
from daemon import cli
from daemon.config import ConfigError, change, load
from daemon.state.database import open_database, transaction
from daemon.tuning import outcome, replays
from daemon.update import find_trainer
from strategies import search
from strategies.objective import Score
from strategies.request import RunReport
from strategies.search import MissingExtra, Unfit, Watch
from strategies.space import Values

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """\
library_directory = "library"
state_directory = "state"

[engines.local]
urls = ["http://127.0.0.1:9"]

[models.npc]  # the people of the Library
base_path = "{base}"
engine = "local"

[models.npc.lora]
rank = 4
alpha = 8

[models.npc.training]
learning_rate = 2e-5  # far too small
epochs = 1

[[models.npc.strategy]]
name = "replay"
ratio = 0.25  # a quarter
"""


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path) -> Path:
    """A directory with a configuration and a model that has learned three updates of ten examples."""
    (tmp_path / "eternad.toml").write_text(CONFIG.format(base=tiny_base))
    connection = open_database(tmp_path / "state" / "eternad.db")
    for number in (1, 2, 3):
        with transaction(connection):
            items = [
                (Example(shape="demonstration", prompt=f"Who keeps room {number}{each}?", completion="The porter."),
                 Origin(file="f", line=each))
                for each in range(10)
            ]  # fmt: skip
            journal.add(connection, "npc", items, heldout_fraction=0.2)
            claims.claim(connection, "npc", f"run-{number}", 10)
            claims.consume(connection, f"run-{number}", number)
    connection.close()
    return tmp_path


def tune(place: Path, *arguments: str) -> int:
    """The command in this process."""
    return cli.main(["tune", "npc", "--config", str(place / "eternad.toml"), *arguments])


@pytest.fixture(autouse=True)
def signals_as_before() -> object:
    """The command takes SIGTERM and SIGINT for itself."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.slow
def test_a_search_beats_what_was_configured_and_writes_the_change(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that learns nothing is found to be too small; comments stay, the old file is kept."""
    before = (place / "eternad.toml").read_text()
    assert tune(place, "--trials", "2", "--sampler", "random", "--apply", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["updates"] == [1, 2, 3] and result["comparison"]["updates"] == [3]
    assert result["comparison"]["tuned_value"] > result["comparison"]["configured_value"]
    after = (place / "eternad.toml").read_text()
    assert (place / "eternad.toml.bak").read_text() == before
    model = load(place / "eternad.toml").models["npc"]
    assert model.training.learning_rate == result["changes"]["training.learning_rate"] > 2e-5
    assert model.lora.alpha == 2 * model.lora.rank
    assert "# far too small" in after and "# a quarter" in after
    (directory,) = (place / "state" / "tuning" / "npc").iterdir()
    for picture in ("history.svg", "importance.svg", "front.svg"):
        ElementTree.fromstring((directory / picture).read_text())
    assert not list((directory / "work").iterdir())


@pytest.mark.slow
def test_a_search_killed_with_its_trainer_at_work_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL: the finished trials are the same afterwards, the orphaned trainer is ended, its trial is tried again."""
    command = [sys.executable, "-m", "daemon", "tune", "npc", "--trials", "3", "--sampler", "random"]
    child = subprocess.Popen(
        [*command, "--config", str(place / "eternad.toml")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    first = child.stdout.readline()
    assert first.startswith("trial 0: ")
    directory = _at_work(place)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    orphan = find_trainer(directory)
    if orphan is not None:
        os.kill(orphan, signal.SIGSTOP)  # it would outlive any patience
    monkeypatch.setattr(replays, "compare", lambda *_: None)  # four more trainings that say nothing of the resumption
    assert tune(place, "--trials", "2", "--sampler", "random", "--json") == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [trial["number"] for trial in trials] == [0, 2]
    assert f"trial 0: {trials[0]['value']:+.4f}" in first
    assert orphan is None or not _is_alive(orphan)


def _at_work(place: Path) -> Path:
    """The run directory of a second trial."""
    deadline = time.monotonic() + 60
    while not (found := list((place / "state" / "tuning").glob("npc/*/work/trial-0001/*/request.json"))):
        assert time.monotonic() < deadline, "no second trial began"
        time.sleep(0.02)
    return found[0].parent


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_dry_run_prints_the_space(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What would vary, between which bounds, on which updates; nothing is written."""
    assert tune(place, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "on updates 1, 2; held out for the comparison: 3" in said
    for name in ("training.learning_rate", "lora.rank", "replay.ratio"):
        assert name in said
    assert not (place / "state" / "tuning").exists()


def test_what_cannot_be_searched_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing extra, a sampler that does not exist, too short a past."""

    def missing(sampler: str) -> None:
        raise MissingExtra("needs optuna: pip install 'eternad[tune]'")

    monkeypatch.setattr("strategies.search.require", missing)
    assert tune(place) == 1
    assert capsys.readouterr().err == "eternad: needs optuna: pip install 'eternad[tune]'\n"
    assert tune(place, "--sampler", "genetic") == 2
    (place / "state" / "eternad.db").unlink()
    assert tune(place) == 1
    assert "a search needs 3" in capsys.readouterr().err


def test_a_rehearsal_is_a_life_that_begins_anew(place: Path) -> None:
    """Only the updates asked for, waiting; the journal itself is not touched; a retracted test example is not there."""
    connection = open_database(place / "state" / "eternad.db")
    with transaction(connection):
        connection.execute("UPDATE example SET split = 'eval', state = 'retracted' WHERE id = 1")
    assert rehearsal.taught(connection, "npc", 9) == [1, 2, 3]
    counts = journal.counts(connection, "npc")
    with rehearsal.rehearsal(connection, "npc", [2]) as copy:
        assert journal.counts(copy, "npc") == {"heldout/pending": 2, "train/pending": 8}
        alone = rehearsal.fingerprint(copy)
        rehearsal.begin(copy, 2, "again")
        assert journal.counts(copy, "npc") == {"heldout/claimed": 2, "train/claimed": 8}
        rehearsal.end(copy, 2)
        assert journal.counts(copy, "npc") == {"heldout/consumed": 2, "train/consumed": 8}
    assert journal.counts(connection, "npc") == counts
    with rehearsal.rehearsal(connection, "npc", [1, 2]) as copy:
        assert rehearsal.fingerprint(copy) != alone
    connection.close()


def test_only_failures_of_values_are_forgiven() -> None:
    """A loss that is not finite is the settings' fault; a missing base model is not, and ends the search."""
    failed = RunReport(run_id="r", status="failed")
    for code in ("non_finite_loss", "oom"):
        with pytest.raises(Unfit, match=code):
            replays._reported(replays.Finished(outcome="failed", code=code, report=failed), Path("r"))
    with pytest.raises(replays.CannotTune, match="no base"):
        replays._reported(replays.Finished(outcome="failed", code="base_missing", reason="no base"), Path("r"))


def test_a_change_adds_missing_tables_and_refuses_what_is_gone() -> None:
    """A table that the file does not have yet is added; a strategy that was taken out since is not brought back."""
    text = '[models.npc]\nengine = "e"\n\n[models.book]\nengine = "e"  # other\n'
    after = change.changed(text, "npc", {"training.epochs": 5, "lora.rank": 8})
    assert tomllib.loads(after)["models"] == {
        "npc": {"engine": "e", "training": {"epochs": 5}, "lora": {"rank": 8}},
        "book": {"engine": "e"},
    }
    assert "# other" in after and "+epochs = 5" in change.difference(text, after, "eternad.toml")
    with pytest.raises(ConfigError, match="no strategy `ewc`"):
        change.changed(text, "npc", {"ewc.strength": 2.0})


def test_a_change_that_the_daemon_would_refuse_is_not_written(place: Path) -> None:
    """The file stays, and no half-written one beside it."""
    path = place / "eternad.toml"
    before = path.read_text()
    with pytest.raises(ConfigError):
        change.replace(path, before.replace("epochs = 1", "epochs = 0"))
    assert path.read_text() == before
    assert not list(place.glob("*.bak")) and not list(place.glob(".*.tmp"))


@pytest.mark.slow
def test_two_trials_at_a_time_are_both_real(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--jobs 2`: two trainers at work at once, each in its own directory; both are scored and nothing is left."""
    rows = (place / "eternad.toml").read_text().replace("ratio = 0.25", "ratio = 0.0")
    (place / "eternad.toml").write_text(rows)
    seen: set[int] = set()
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(0.02):
            seen.add(len(list((place / "state").glob("tuning/npc/*/work/trial-*/*/request.json"))))

    thread = threading.Thread(target=watch)
    thread.start()
    house = replays.stage(load(place / "eternad.toml"), "npc")
    found = house.search()
    with search.opened(found) as study:
        search.run(found, study, partial(_first_update, house), trials=2, jobs=2)
        trials = search.finished(found, study)
    watching.set()
    thread.join()
    assert [trial.state for trial in trials] == ["finished", "finished"]
    assert trials[0].values != trials[1].values and max(seen) == 2
    assert not list((place / "state").glob("tuning/npc/*/work/*"))


def _first_update(house: replays.Stage, number: int, values: Values, watch: Watch) -> Score:
    """One training instead of two: enough to see that two run beside each other."""
    return replays.play(house, f"trial-{number:04d}", values, house.searched[:1], watch)[0]


def test_what_the_latest_search_proposes_is_accepted_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No search runs; the file is changed as `--apply` would; what it says already is not proposed again."""
    assert tune(place, "--accept") == 1
    assert "no search proposes a change for npc" in capsys.readouterr().err
    directory = place / "state" / "tuning" / "npc" / "abc"
    directory.mkdir(parents=True)
    result = outcome.Result(
        model="npc", sampler="tpe", updates=[1, 2, 3], space=[], trials=[], best=1, front=[], importance={},
        comparison=None, changes={"training.learning_rate": 3e-4, "replay.ratio": 0.5}, difference="-a\n+b",
    )  # fmt: skip
    outcome.keep(directory, result)
    assert tune(place, "--accept") == 0
    model = load(place / "eternad.toml").models["npc"]
    assert model.training.learning_rate == 3e-4 and (place / "eternad.toml.bak").exists()
    assert tune(place, "--accept") == 1


def test_options_stand_in_for_the_rules_of_the_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not given is taken from the table; an engine that does not exist is refused."""
    path = place / "eternad.toml"
    path.write_text(path.read_text() + '\n[models.npc.tuning]\nsampler = "grid"\nupdates = 3\n')
    assert tune(place, "--dry-run") == 0
    assert "npc: grid on updates" in capsys.readouterr().out
    assert tune(place, "--dry-run", "--sampler", "random") == 0
    assert "npc: random on updates" in capsys.readouterr().out
    assert tune(place, "--engine", "spark") == 2
    assert "spark" in capsys.readouterr().err
