"""A rebase: every N updates a fresh adapter learns the whole buffer, and is judged against the version before."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from test_consolidate import parent, second
from test_learners import texts
from test_train import FACTS, demonstration, make_run, publish

from buffers.policy import Buffer
from daemon.config import Model
from daemon.update import is_rebase, recipe_of
from strategies import catalog, checkpoint, course
from strategies.adapter import load_adapter
from strategies.ema import SlowAverage
from strategies.plugins import build
from strategies.pulse import Interrupted, Pulse
from strategies.request import Lora, RunReport, Training
from strategies.template import Template
from strategies.train import attempt

fixtures = (parent,)
ROWS = [
    *(demonstration(*fact, update=2) for fact in FACTS[8:16]),
    *(demonstration(*fact, role="replay") for fact in FACTS[:8]),
    *(demonstration(*fact, role="heldout_old") for fact in FACTS[16:]),
]


def run(base: Path, directory: Path, version: Path | None, **fields: object) -> RunReport:
    """The second update, on eight new facts and eight that were known."""
    make_run(directory, base, ROWS, training={"epochs": 3}, update_number=2, parent_version=version,
             canary_prompts=[], **fields)  # fmt: skip
    report = attempt(directory, Pulse(directory))
    assert report.status == "trained", report.reason
    return report


def weights(directory: Path, base: Path) -> torch.Tensor:
    adapter = load_adapter(base, Lora(rank=4, alpha=8.0))
    adapter.load(directory / "adapter" if (directory / "adapter").exists() else directory)
    return adapter.flat


def test_a_rebase_learns_with_a_fresh_adapter_and_is_compared_with_its_parent(
    parent: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Its weights are those of a run without any parent, bit for bit; its losses before are the parent's."""
    rebased = run(tiny_base, tmp_path / "rebased", parent, rebase=True)
    alone = run(tiny_base, tmp_path / "alone", None)
    continued = run(tiny_base, tmp_path / "continued", parent)
    assert torch.equal(weights(tmp_path / "rebased", tiny_base), weights(tmp_path / "alone", tiny_base))
    assert not torch.equal(weights(tmp_path / "rebased", tiny_base), weights(tmp_path / "continued", tiny_base))
    assert rebased.evaluation is not None and continued.evaluation is not None and alone.evaluation is not None
    assert rebased.evaluation.old["1"].before == continued.evaluation.old["1"].before
    assert rebased.evaluation.old["1"].before != alone.evaluation.old["1"].before
    assert rebased.strategies["rebase"] == {"examples": 16.0}


def test_methods_begin_anew_and_take_all_of_it_as_new(parent: Path, tiny_base: Path, tmp_path: Path) -> None:
    """EWC's anchor has seen one update, not two; DER++ has answers to what was replayed as well."""
    strategies = [catalog.Ewc(samples=4), catalog.DerPlusPlus()]
    make_run(tmp_path / "1", tiny_base, [demonstration(*fact) for fact in FACTS[:8]], strategies=strategies,
             canary_prompts=[])  # fmt: skip
    assert attempt(tmp_path / "1", Pulse(tmp_path / "1")).status == "trained"
    version = publish(tmp_path / "1", tmp_path / "version")
    rebased = run(tiny_base, tmp_path / "2", version, rebase=True, strategies=strategies)
    assert rebased.strategies["ewc"]["updates"] == 1
    assert "penalty" not in rebased.strategies["ewc"]
    assert rebased.strategies["derpp"]["stored"] == 16


def test_teachers_and_references_are_the_version_before(tiny_base: Path) -> None:
    """Not the fresh weights that a rebase begins with."""
    adapter = load_adapter(tiny_base, Lora(rank=4, alpha=8.0))
    served = adapter.flat + 0.1 * torch.randn(len(adapter.flat), generator=torch.Generator().manual_seed(1))
    items = texts("new", 1, 2)
    loop = Template(adapter=adapter, training=Training(), items={"new": items}, previous=served)
    (taught, _), (own, _) = (loop.teacher_top(items, teacher, 3) for teacher in ("previous", "current"))
    assert not torch.equal(taught.logprobs, own.logprobs)
    adapter.assign(served)
    assert torch.equal(taught.logprobs, loop.teacher_top(items, "current", 3)[0].logprobs)


def test_an_interrupted_rebase_goes_on_as_if_it_had_not_been(
    parent: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has the fresh adapter's weights, the parent is only read for the comparison."""
    whole = run(tiny_base, tmp_path / "whole", parent, rebase=True)
    broken = tmp_path / "broken"
    make_run(broken, tiny_base, ROWS, training={"epochs": 3}, update_number=2, parent_version=parent,
             canary_prompts=[], rebase=True)  # fmt: skip
    pulse = Pulse(broken)
    monkeypatch.setattr(course, "SECONDS_BETWEEN_CHECKPOINTS", math.inf)
    step, seen = pulse.step, []

    def stopping(*numbers: float) -> None:
        step(*numbers)  # type: ignore[arg-type]
        seen.append(numbers)
        pulse.is_told_to_stop = len(seen) == 3

    monkeypatch.setattr(pulse, "step", stopping)
    with pytest.raises(Interrupted):
        attempt(broken, pulse)
    resumed = attempt(broken, Pulse(broken))
    assert resumed.losses == whole.losses
    assert torch.equal(weights(broken, tiny_base), weights(tmp_path / "whole", tiny_base))


@pytest.mark.parametrize(("number", "expected"), [(1, False), (2, False), (3, True), (4, False), (6, True)])
def test_every_so_many_updates_it_is_due(number: int, expected: bool) -> None:
    """The first update has a fresh adapter anyway; without the key it is never due."""
    model = Model(base_path=Path(), engine="e", training=Training(rebase_every_updates=3))
    assert is_rebase(model, number) is expected
    assert not is_rebase(Model(base_path=Path(), engine="e"), number)


def test_its_experience_has_the_whole_buffer() -> None:
    """Whatever share an ordinary update replays."""
    model = Model(base_path=Path(), engine="e", buffer=Buffer(examples=7), strategy=[catalog.Replay(ratio=0.1)])
    assert recipe_of(model, rebase=True).whole_buffer and not recipe_of(model).whole_buffer


@pytest.mark.parametrize(("rise", "used"), [(0.5, 1.0), (0.1, 0.0)])
def test_the_slow_average_is_taken_only_where_less_is_forgotten(tiny_base: Path, rise: float, used: float) -> None:
    """Under it the old hold-outs rise by 0.3: better than by 0.5, worse than by 0.1."""
    adapter = load_adapter(tiny_base, Lora(rank=4, alpha=8.0))
    learner = build([catalog.SlowAverage(decay=0.5)])[0]
    assert isinstance(learner, SlowAverage)
    learner.load_state({"average": torch.zeros_like(adapter.flat)}, {"updates": 3})
    candidate = adapter.flat.clone()
    loop = Template(adapter=adapter, training=Training(), items={})
    learner.offer(loop, rise, lambda _: 0.3)
    torch.testing.assert_close(adapter.flat, candidate * (0.5 if used else 1.0))
    assert loop.position.counters["ema"] == {"old_loss_rise": 0.3, "used": used}


def test_an_update_that_forgets_too_much_falls_back_on_the_slow_average(
    parent: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """It contradicts the first update; under the average of the two much less of that is lost."""
    version = shutil.copytree(parent, tmp_path / "version")
    first = SlowAverage(catalog.SlowAverage())
    first.average, first.updates = weights(version, tiny_base), 1
    checkpoint.save_states(version / "strategy", [first])
    report = second(version, tiny_base, tmp_path / "slow", strategies=[first.parameters], merge_old_loss=0.0, epochs=5)
    assert report.strategies["ema"]["used"] == 1.0 and report.strategies["ema"]["updates"] == 2.0
    assert report.evaluation is not None
    assert report.evaluation.old["1"].change.mean == pytest.approx(report.strategies["ema"]["old_loss_rise"], abs=1e-3)
