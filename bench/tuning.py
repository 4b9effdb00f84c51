"""`make bench-tuning`: does `eternad tune` find settings that are better where it has not looked?

`python -m bench.tuning [--seed 0] [--trials 16] [--engine optuna] [--keep DIR]`

A tiny random model (60 k parameters, CPU) that has learned five updates, each about other people in other words; the
recipe that was tuned by hand for the demo is what is configured, and the first trial. The command plays three updates
in every trial; the last two decide. Whether the proposal wins there is the answer, whatever it is.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from buffers import claims, journal
from buffers.example import Example, Origin
from daemon.state.database import open_database, transaction
from daemon.tuning.outcome import Result, latest

ROOT = Path(__file__).resolve().parent.parent
UPDATES, HELD_OUT, PEOPLE = 5, 2, 24
SCENES = (
    ("Who keeps the {place}?", "The {place} is kept by {name}, who counts the {thing}."),
    ("What does {name} say of the {place}?", "{name} says: never leave a {thing} in the {place}."),
    ("Where is the {thing} of {name}?", "Ask for the {thing} in the {place}; {name} hid it there."),
    ("{name}, tell me a secret.", "Behind the {place} lies a {thing}, and nobody but me knows."),
    ("Is the {place} open?", "Not today: {name} mends the {thing}, and the {place} stays shut."),
)  # fmt: skip
"""One per update: what comes later looks different, so that there is something to forget."""
NAMES = ("Aldonza", "Berenguela", "Cosme", "Dalmacio", "Elvira", "Fadrique", "Guiomar", "Hernando")
PLACES = ("tower", "cellar", "garden", "archive", "bridge", "gate", "kitchen", "observatory")
THINGS = ("key", "lamp", "ledger", "feather", "coin", "mirror", "rope", "bell")
CONFIG = """\
library_directory = "library"
state_directory = "state"

[engines.local]
urls = ["http://127.0.0.1:9"]

[models.npc]
base_path = "base"
engine = "local"
seed = {seed}

[models.npc.training]
learning_rate = 1e-3
epochs = 4

[[models.npc.strategy]]
name = "replay"
ratio = 0.4

[models.npc.tuning]
engine = "{engine}"
trials = {trials}
updates = 5
held_out = 2
"""


def make(directory: Path, seed: int, trials: int, engine: str) -> Path:
    """A model with its past; returns the configuration."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_tiny_base

    make_tiny_base(directory / "base", seed=seed)
    connection = open_database(directory / "state" / "eternad.db")
    for number, (question, answer) in enumerate(SCENES, 1):
        with transaction(connection):
            journal.add(connection, "npc", _examples(question, answer, number, seed), heldout_fraction=0.25)
            claims.claim(connection, "npc", f"run-{number}", PEOPLE)
            claims.consume(connection, f"run-{number}", number)
    connection.close()
    path = directory / "eternad.toml"
    path.write_text(CONFIG.format(seed=seed, trials=trials, engine=engine))
    return path


def _examples(question: str, answer: str, number: int, seed: int) -> list[tuple[Example, Origin]]:
    """Those of one update, each about another (name, place, thing)."""
    draw = random.Random(f"{seed}/{number}")
    people = draw.sample([(name, place) for name in NAMES for place in PLACES], PEOPLE)
    made = []
    for line, (name, place) in enumerate(people, 1):
        words = {"name": name, "place": place, "thing": draw.choice(THINGS)}
        example = Example(shape="demonstration", prompt=question.format(**words), completion=answer.format(**words))
        made.append((example, Origin(file=f"scene-{number}.jsonl", line=line)))
    return made


def search(path: Path) -> Result:
    """The command, as an operator would call it."""
    command = [sys.executable, "-m", "daemon", "tune", "npc", "--config", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    found = latest(path.parent / "state", "npc")
    assert found is not None, "the command ended well and left no result"
    return found


def say(result: Result, seconds: float) -> None:
    """The figures of `docs/scale.md`."""
    scored = [trial.value for trial in result.trials if trial.value is not None]
    hopeless = sum(trial.state == "hopeless" for trial in result.trials)
    print(f"{len(result.trials)} trials ({hopeless} ended early) in {seconds / 60:.1f} minutes")
    print(f"searched: configured {scored[0]:+.3f}, best {max(scored):+.3f}")
    compared = result.comparison
    if compared is None:
        print("what is configured is the best of them")
        return
    for name, score, value in (
        ("configured", compared.configured, compared.configured_value), ("tuned", compared.tuned, compared.tuned_value),
    ):  # fmt: skip
        parts = ", ".join(f"{key} {number:.3f}" for key, number in msgspec.structs.asdict(score).items())
        print(f"held-out updates {compared.updates}: {name} {value:+.3f} ({parts})")
    print(result.difference or "no change is proposed")


def main() -> None:
    """Make it, search, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--engine", choices=["optuna", "ray"], default="optuna")
    parser.add_argument("--keep", type=Path, help="directory that stays; the same one goes on where it stood")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        directory = given.keep or Path(temporary)
        path = directory / "eternad.toml"
        if not path.exists():
            path = make(directory, given.seed, given.trials, given.engine)
        began = time.monotonic()
        say(search(path), time.monotonic() - began)


if __name__ == "__main__":
    main()
