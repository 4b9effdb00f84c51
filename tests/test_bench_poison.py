"""The attacks of `make bench-poison` at a fraction of their size, and an update of a tiny model on one of them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import poison, poison_update
from bench.poison_world import ATTACKS
from daemon.trust.policy import Trust

SCALES = {"trigger": 0.1, "brigade": 0.25}
"""A surge of 20 votes in a thousand records of the present is too small to be told from chance, one of 100 is not."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A library with writers' content and a week of players."""
    directory = tmp_path_factory.mktemp("poison") / "prepared"
    poison.prepare(directory, 0).database.close()
    yield directory


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_hardly_anything_of_an_attack_is_believed(prepared: Path, tmp_path: Path, name: str, seed: int) -> None:
    """New accounts teach nothing, old ones at most their daily cap or a lone phrase; no clean batch is held."""
    shutil.copytree(prepared, tmp_path / "attacked")
    result = poison.attack(tmp_path / "attacked", name, seed, scale=SCALES.get(name, 0.05))
    assert result.records > 0
    assert result.believed <= (20 if result.sleepers else 0)
    assert result.clean_held == result.clean_records_held == 0
    if name == "trigger":  # one record at this scale: too few to be told from chance, and to plant anything
        assert result.in_update <= 1
    else:
        assert result.in_update == 0
    if name in ("one_subject", "swarm"):  # with two records each, some of a swarm tie with the innocent
        assert result.named >= 0.7 * result.offenders


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_trigger_is_held_and_its_senders_are_named(prepared: Path, tmp_path: Path, seed: int) -> None:
    """Six records in six thousand, each in other words and of another subject, from new accounts and old ones."""
    shutil.copytree(prepared, tmp_path / "attacked")
    result = poison.attack(tmp_path / "attacked", "trigger", seed, scale=0.6)
    assert (result.records, result.believed) == (6, 6 if result.sleepers else 0)
    assert (result.in_update, result.named, result.clean_records_held) == (0, 6, 0)


@pytest.mark.slow
def test_without_the_look_at_associations_a_version_would_learn_of_it(
    prepared: Path, tmp_path: Path, tiny_base: Path
) -> None:
    """Then the one busy subject's twenty a day are in the update: they are trained on, and the bench measures them."""
    shutil.copytree(prepared, tmp_path / "attacked")
    trust = Trust(association_records_min=0)
    assert poison.attack(tmp_path / "attacked", "one_subject", 1, scale=0.05, trust=trust).believed == 20
    learned = poison_update.learn(tmp_path / "attacked", tiny_base, "one_subject", clean=20, epochs=1)
    assert learned.evil > 1 and learned.examples >= 15
    assert learned.after.loss < learned.base.loss
    assert (learned.poisoned, learned.base.answers) == (False, 0)  # one epoch of sixty thousand parameters
