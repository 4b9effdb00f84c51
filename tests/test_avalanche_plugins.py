"""Avalanche's own plugins in our loop: they act, they resume, and those that do not fit are refused with a reason."""

import csv
from pathlib import Path

import msgspec
import pytest
import torch
from test_learners import LORA, texts

from strategies import catalog
from strategies.adapter import load_adapter
from strategies.catalog import Avalanche
from strategies.failure import Failure
from strategies.plugins import build
from strategies.request import Training
from strategies.template import Events, Template, UpdateExperience


def trained(base: Path, *plugins: Avalanche, epochs: int = 3) -> tuple[Template, list[float]]:
    """A run of two steps an epoch, and the learning rate of every step."""
    items, rates = texts("new", 1, 6), []
    loop = Template(
        adapter=load_adapter(base, LORA, precision="float32"),
        training=Training(learning_rate=1e-2, epochs=epochs, batch_examples=3),
        items={"new": items}, learners=build(plugins),
        events=Events(after_step=lambda loop: rates.append(loop.optimizer.param_groups[0]["lr"])),
    )  # fmt: skip
    loop.train(UpdateExperience(items, 1), eval_streams=[])
    return loop, rates


def test_a_schedule_by_epochs_takes_the_learning_rate_over(tiny_base: Path) -> None:
    """Halved after every epoch, from the configured rate on; without it warm-up and cosine decide."""
    halving = Avalanche(parameters={"scheduler": "StepLR", "step_size": 1, "gamma": 0.5})
    loop, rates = trained(tiny_base, halving)
    assert rates == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3])
    assert loop.position.counters["avalanche"] == {"learning_rate": pytest.approx(1.25e-3)}
    assert trained(tiny_base)[1] != pytest.approx(rates)


def test_a_schedule_by_iterations_and_its_state(tiny_base: Path) -> None:
    """It steps with every optimiser step, and goes on from the state of a checkpoint, not from that of a version."""
    falling = Avalanche(parameters={"gamma": 0.9, "step_granularity": "iteration"})
    loop, rates = trained(tiny_base, falling, epochs=1)
    # the rate is looked at after the step of the schedule
    assert rates == pytest.approx([0.9e-2, 0.81e-2])
    notes = msgspec.json.decode(msgspec.json.encode(loop.learners[0].state()[1]))
    (fresh,) = build([falling])
    fresh.load_state({}, notes)  # of a parent version
    fresh.before_training_exp(loop)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)
    fresh.load_state({}, notes)  # of a checkpoint
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.81e-2)


def test_loggers_write_the_loss_of_every_epoch(tiny_base: Path, tmp_path: Path) -> None:
    """A text file and a table per update, both with the run's own numbers; training is what it was."""
    entries = [Avalanche(plugin=kind, parameters={"directory": str(tmp_path)}) for kind in ("TextLogger", "CSVLogger")]
    loop, _ = trained(tiny_base, *entries)
    losses = [loss for _, loss in loop.position.losses]
    means = [sum(losses[place : place + 2]) / 2 for place in (0, 2, 4)]
    with (tmp_path / "update-00001" / "training_results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["training_loss"]) for row in rows] == pytest.approx(means, abs=1e-4)
    text = (tmp_path / "update-00001.txt").read_text()
    assert text.count("Loss_Epoch/train_phase") == 3 and f"{means[-1]:.4f}" in text
    assert torch.equal(loop.adapter.flat, trained(tiny_base)[0].adapter.flat)


def test_a_logger_that_cannot_write_fails_the_run(tiny_base: Path, tmp_path: Path) -> None:
    """With the plugin, the place and the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="TextLogger cannot log to"):
        trained(tiny_base, Avalanche(plugin="TextLogger", parameters={"directory": str(tmp_path / "file")}))
    with pytest.raises(Failure, match="pip install tensorboard"):
        trained(tiny_base, Avalanche(plugin="TensorboardLogger", parameters={"directory": str(tmp_path)}))
    with pytest.raises(Failure, match="gamma"):
        trained(tiny_base, Avalanche(parameters={"scheduler": "ExponentialLR"}))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [({"plugin": "GDumbPlugin"}, "balanced"), ({"plugin": "EWCPlugin"}, 'name = "ewc"'),
     ({"plugin": "Nonsense"}, "known: LRSchedulerPlugin, EarlyStoppingPlugin, MIRPlugin, TextLogger"),
     ({"plugin": "CSVLogger"}, "directory"), ({"parameters": {"scheduler": "OneCycleLR"}}, "known: ConstantLR")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_done(entry: dict[str, object], reason: str) -> None:
    """By the configuration itself, with what does the same here."""
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert({"name": "avalanche", **entry}, catalog.Strategy)


def test_two_plugins_may_stand_beside_each_other_the_same_one_may_not() -> None:
    """A schedule and a logger are two entries of one name."""
    schedule, logger = Avalanche(), Avalanche(plugin="CSVLogger", parameters={"directory": "x"})
    assert len({learner.name for learner in build([schedule, logger])}) == 2
    with pytest.raises(Failure, match="given twice"):
        build([schedule, Avalanche(parameters={"gamma": 0.5})])
