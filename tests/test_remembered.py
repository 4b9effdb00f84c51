"""What weights have said once is not asked again, and nothing else is taken for it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_evaluate import make_items
from test_train import facts, make_run, publish

from strategies import train
from strategies.adapter import Adapter, load_adapter
from strategies.evaluate import Probes, standing
from strategies.forward import token_losses
from strategies.remembered import FILES, Remembered
from strategies.request import EXIT_TRAINED, Lora, read_report


@pytest.fixture
def adapter(tiny_base: Path) -> Adapter:
    """An adapter that says something."""
    made = load_adapter(tiny_base, Lora(rank=4, alpha=8.0, dropout=0.0), precision="float32")
    made.assign(torch.randn(made.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return made


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each forward pass."""
    found: list[int] = []
    whole = Adapter.hidden

    def counted(self: Adapter, tokens: torch.Tensor, lengths: Any = None) -> torch.Tensor:
        found.append(len(tokens))
        return whole(self, tokens, lengths)

    monkeypatch.setattr(Adapter, "hidden", counted)
    return found


def probes(new: int = 3, seed: int = 0) -> Probes:
    """Hold-outs, and general text."""
    general = make_items(4, "probe", 7, shape="text", start=1)
    return Probes(make_items(new, seed=seed), {1: make_items(5, seed=9)}, [], general)


def test_known_weights_are_not_asked_again(adapter: Adapter, tmp_path: Path, passed: list[int]) -> None:
    """The next update's items are other objects with the same tokens; what is new among them is asked."""
    once, twice = probes(), probes()
    first = standing(adapter, once, Remembered(tmp_path, adapter, "base"))
    assert sum(passed) == 3 + 5 + 4
    passed.clear()
    adapter.refresh()
    again = standing(adapter, twice, Remembered(tmp_path, adapter, "base"))
    assert passed == [] and again.scores == first.scores
    for one, other in zip(once.general, twice.general, strict=True):
        assert torch.equal(first.states[one], again.states[other])
    adapter.refresh()
    more = standing(adapter, probes(new=2, seed=5), Remembered(tmp_path, adapter, "base"))
    assert sum(passed) == 2
    adapter.refresh()
    torch.testing.assert_close(
        torch.tensor(more.scores.losses["new"], dtype=torch.float64), token_losses(adapter, make_items(2, seed=5))
    )


def test_other_weights_are_others(adapter: Adapter, tmp_path: Path, tiny_base: Path) -> None:
    """Another base, the base alone, another step, another precision: each has a file of its own."""
    half = load_adapter(tiny_base, Lora(rank=4, alpha=8.0, dropout=0.0), precision="bfloat16")
    half.assign(adapter.flat.clone())
    paths = {Remembered(tmp_path, adapter, base).path for base in ("one", "two")}
    with adapter.disabled():
        paths.add(Remembered(tmp_path, adapter, "one").path)
    paths.add(Remembered(tmp_path, half, "one").path)
    adapter.flat[0] += 1e-6
    paths.add(Remembered(tmp_path, adapter, "one").path)
    assert len(paths) == 5


def test_of_players_words_only_losses_are_kept(adapter: Adapter, tmp_path: Path) -> None:
    """Without general text drift is measured on hold-outs: their states would tell what was said."""
    kept = Remembered(tmp_path, adapter, "base")
    standing(adapter, Probes([], {1: make_items(3)}, []), kept)
    with safe_open(kept.path, "pt") as file:
        assert set(file.keys()) == {"keys", "losses"}
        assert file.get_tensor("losses").shape == (3,)


@pytest.mark.parametrize("damage", ["torn", "other", "gone"])
def test_a_damaged_file_is_made_anew(adapter: Adapter, tmp_path: Path, damage: str, passed: list[int]) -> None:
    """It is a cache."""
    kept = Remembered(tmp_path, adapter, "base")
    first = standing(adapter, probes(), kept)
    body = {"torn": kept.path.read_bytes()[:-100], "other": b"{}", "gone": b""}[damage]
    kept.path.write_bytes(body)
    if damage == "gone":
        kept.path.unlink()
    adapter.refresh()
    passed.clear()
    assert standing(adapter, probes(), Remembered(tmp_path, adapter, "base")).scores == first.scores
    assert sum(passed) == 12
    assert Remembered(tmp_path, adapter, "base").losses


def test_only_the_latest_sets_of_weights_stay(adapter: Adapter, tmp_path: Path) -> None:
    """The base's file is used by every update, so it is never the oldest."""
    with adapter.disabled():
        base = Remembered(tmp_path, adapter, "base")
        standing(adapter, probes(), base)
    for number in range(FILES + 2):
        os.utime(base.path, (1e9 + 2 * number, 1e9 + 2 * number))
        adapter.assign(adapter.flat + 0.01)
        kept = Remembered(tmp_path, adapter, "base")
        standing(adapter, probes(), kept)
        os.utime(kept.path, (1e9 + 2 * number + 1, 1e9 + 2 * number + 1))
    assert len(list(tmp_path.glob("*"))) == FILES
    assert base.path.exists()


def test_a_second_update_asks_the_past_nothing(tiny_base: Path, tmp_path: Path, passed: list[int]) -> None:
    """The same verdict as without a memory, in fewer passes: the base and the version before have answered already."""
    run, version, reports, asked = (
        make_run(tmp_path / "1", tiny_base, facts(), general_cache=tmp_path / "cache"),
        None,
        [],
        [],
    )
    assert train.main(run) == EXIT_TRAINED
    version = publish(run, tmp_path / "version")
    for name in ("cache", "other"):
        passed.clear()
        run = make_run(
            tmp_path / name / "2", tiny_base, facts(2), general_cache=tmp_path / name, parent_version=version,
            update_number=2,
        )  # fmt: skip
        assert train.main(run) == EXIT_TRAINED
        report = read_report(run)
        assert report is not None
        reports.append(report)
        asked.append(sum(passed))
    assert asked[0] < asked[1]
    mine, plain = (report.evaluation for report in reports)
    assert mine is not None and plain is not None and mine.new is not None and plain.new is not None
    for one, other in ((mine.new, plain.new), (mine.old["1"], plain.old["1"])):
        for place in ("base", "before", "after"):
            assert getattr(one, place).mean == pytest.approx(getattr(other, place).mean, abs=1e-2)
    assert mine.drift_base is not None and plain.drift_base is not None
    assert mine.drift_base.mean == pytest.approx(plain.drift_base.mean, rel=1e-2)
