"""The attacks of `make bench-poison` at a fraction of their size, and one update of a tiny model on what is left."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import poison, poison_update
from bench.poison_world import ATTACKS

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
    assert result.in_update <= 0.01 * result.update
    assert result.clean_held == 0
    if name in ("one_subject", "swarm"):  # with two records each, some of a swarm tie with the innocent
        assert result.named >= 0.7 * result.offenders


def test_what_is_left_of_an_attack_does_not_poison_a_version(prepared: Path, tmp_path: Path, tiny_base: Path) -> None:
    """One example of the one busy subject is in the small update, and the candidate does not say the name."""
    shutil.copytree(prepared, tmp_path / "attacked")
    assert poison.attack(tmp_path / "attacked", "one_subject", 1, scale=0.05).believed == 20
    learned = poison_update.learn(tmp_path / "attacked", tiny_base, clean=20, epochs=1)
    assert (learned.evil, learned.poisoned) == (1, False)
    assert learned.examples >= 15
