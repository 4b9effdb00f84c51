"""MIRPlugin and EarlyStoppingPlugin by name: what they choose, what they keep, and that a run resumes with them."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from test_learners import LORA, texts
from test_train import FILES, demonstration, facts, interrupt, make_run, run

from strategies import catalog
from strategies.adapter import load_adapter
from strategies.avalanche_stopping import Stopping
from strategies.catalog import Avalanche, Replay
from strategies.forward import token_losses
from strategies.mir import InterferedRetrieval
from strategies.plugins import build
from strategies.request import EXIT_INTERRUPTED, Training
from strategies.template import Template

MIR = Avalanche(plugin="MIRPlugin", parameters={"subsample": 12})
STOPPING = Avalanche(plugin="EarlyStoppingPlugin", parameters={"patience": 2, "margin": 0.05})


def test_mir_replays_what_the_step_would_damage_most(tiny_base: Path) -> None:
    """Of all candidates exactly those whose loss rises most under a step on the new rows alone, found here by hand."""
    new, replay = texts("new", 1, 4), texts("replay", 2, 12)
    adapter = load_adapter(tiny_base, LORA, precision="float32")
    adapter.assign(adapter.flat + 0.05 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)))
    loop = Template(
        adapter=adapter, training=Training(learning_rate=1e-2), items={"new": new, "replay": replay},
        learners=build([Replay(ratio=0.5), MIR]),
    )  # fmt: skip
    (mir,) = (each for each in loop.learners if isinstance(each, InterferedRetrieval))
    loop.step_items = [new[0], replay[0], new[1], replay[1], new[2], replay[2], new[3]]
    start = adapter.flat.clone()
    gradient = loop.gradient_of(new)
    before = token_losses(adapter, replay)
    with adapter.holding(start - 1e-2 * math.sqrt(len(start)) * gradient / gradient.norm()):
        rise = token_losses(adapter, replay) - before
    mir.before_training_exp(loop)
    mir.before_training_iteration(loop)
    chosen = {replay.index(item) for item in loop.step_items if item.role == "replay"}
    assert chosen == set(rise.topk(3).indices.tolist())
    assert [item for item in loop.step_items if item.role == "new"] == new
    assert torch.equal(adapter.flat, start) and not adapter.gradient.any()
    told = loop.position.counters[mir.name]
    assert told["rise"] == pytest.approx(float(rise.topk(3).values.mean())) and told["rise"] > told["rise_of_all"]


def test_mir_leaves_steps_alone_that_have_nothing_to_exchange(tiny_base: Path) -> None:
    """A first update, and a past that the step shows whole."""
    new, replay = texts("new", 1, 2), texts("replay", 2, 2)
    loop = Template(
        adapter=load_adapter(tiny_base, LORA), training=Training(), items={"new": new, "replay": replay},
        learners=build([MIR]),
    )  # fmt: skip
    for step in ([*new], [*new, *replay]):
        loop.step_items = list(step)
        loop.learners[0].before_training_exp(loop)
        loop.learners[0].before_training_iteration(loop)
        assert loop.step_items == step


def seen(losses: list[float], patience: int, margin: float = 0.0) -> tuple[str, float, int]:
    """A run of the plugin over given hold-out losses (the first before training): reason, best loss, epochs done."""
    settings = Avalanche(plugin="EarlyStoppingPlugin", parameters={"patience": patience, "margin": margin})
    (plugin,) = build([settings])
    assert isinstance(plugin, Stopping)
    reasons: list[str] = []
    adapter = SimpleNamespace(flat=torch.tensor([-1.0]))
    adapter.assign = lambda flat: setattr(adapter, "flat", flat)
    loop: Any = SimpleNamespace(adapter=adapter, epoch=0, stop=reasons.append, report=lambda *_: None)
    plugin._look = lambda _: setattr(plugin, "last", losses[max(int(adapter.flat), -1) + 1])  # type: ignore[assignment,method-assign]
    plugin.before_training_exp(loop)
    for epoch in range(len(losses) - 1):
        loop.epoch = epoch
        plugin.before_training_epoch(loop)
        if reasons:
            break
        adapter.flat = torch.tensor([float(epoch)])
        plugin.after_training_epoch(loop)
    plugin.restore(loop)
    return (reasons or [""])[0], losses[int(adapter.flat) + 1], loop.epoch


def test_early_stopping_keeps_the_best_epoch() -> None:
    """After `patience` worse epochs; at the end of the run; not for less than the margin; a harmful run not at all."""
    reason, best, epochs = seen([5.0, 3.0, 4.0, 4.0, 1.0], patience=2)
    assert "no lower loss on heldout_new for 2 epochs" in reason and (best, epochs) == (3.0, 3)
    assert seen([5.0, 3.0, 2.0, 4.0], patience=2)[:2] == ("", 2.0)
    assert seen([5.0, 3.0, 2.0], patience=2)[:2] == ("", 2.0)
    assert seen([5.0, 3.0, 2.9, 2.8, 0.0], patience=2, margin=0.5)[1] == 3.0
    assert seen([5.0, 6.0, 7.0], patience=9)[1] == 5.0


def test_a_run_stops_where_the_plugin_says_and_resumes_bit_for_bit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the whole trainer, with MIR beside it: the same adapter with and without an interruption."""
    held = [demonstration("What does a stranger say?", "xyzzy plugh", role="heldout_new")] * 2
    past = [demonstration(f"Who keeps gate {place}?", f"Porter {place}", role="replay") for place in range(16)]
    strategies = [Replay(ratio=0.5), MIR, STOPPING]
    directories = [
        make_run(tmp_path / name, tiny_base, [*facts(), *held, *past], strategies=strategies,
                 training={"epochs": 6, "early_stop_patience": 1})
        for name in ("whole", "torn")
    ]  # fmt: skip
    report = run(directories[0])
    assert "EarlyStoppingPlugin: no lower loss on heldout_new" in report.stopped_early and report.epochs < 6
    assert 0 < report.strategies["avalanche-EarlyStoppingPlugin"]["best_epoch"] == report.epochs - 2
    assert report.strategies["avalanche-MIRPlugin"]["replaced"] > 0
    assert interrupt(directories[1], 3, monkeypatch) == EXIT_INTERRUPTED
    again = run(directories[1])
    assert (again.losses, again.stopped_early) == (report.losses, report.stopped_early)
    assert (directories[0] / FILES[0]).read_bytes() == (directories[1] / FILES[0]).read_bytes()
    shutil.rmtree(directories[0])


@pytest.mark.parametrize(
    ("entry", "reason"),
    [({"plugin": "MIRPlugin", "parameters": {"mem_size": 9}}, "takes subsample"),
     ({"plugin": "EarlyStoppingPlugin", "parameters": {"metric_name": "Top1"}}, "margin, patience, val_stream_name"),
     ({"plugin": "EarlyStoppingPlugin", "parameters": {"val_stream_name": "test"}}, "known: heldout_new, eval")],
)  # fmt: skip
def test_parameters_that_mean_nothing_here_are_refused(entry: dict[str, object], reason: str) -> None:
    """With those that do."""
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert({"name": "avalanche", **entry}, catalog.Strategy)
