"""Avalanche's own plugins by name: a scheduler of the learning rate, and loggers.

Most of Avalanche's methods assume a classifier, copy the whole model or keep every data set alive; those are built anew
in this package, and `strategies.catalog` says which. What is here acts on the optimiser or on metrics alone; early
stopping is shown the adapter as the model (`strategies.avalanche_stopping`), MIR is built anew (`strategies.mir`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.avalanche_stopping import Stopping
from strategies.failure import Failure
from strategies.lean_avalanche import LRSchedulerPlugin, MetricValue, logger_class
from strategies.learner import JsonNotes, Learner, Loop
from strategies.mir import InterferedRetrieval


class EpochLoss:
    """The mean training loss of an epoch, as Avalanche's loggers expect a metric: asked after every callback."""

    NAME = "Loss_Epoch/train_phase/train_stream/Task000"

    def __init__(self) -> None:
        self._seen = 0

    def before_training_exp(self, strategy: Any) -> None:
        """A resumed run logs what comes after its checkpoint."""
        self._seen = len(strategy.position.losses)

    def after_training_epoch(self, strategy: Any) -> Any:
        """One value, at the step that the epoch ended with."""
        losses = [loss for _, loss in strategy.position.losses[self._seen :]]
        self._seen = len(strategy.position.losses)
        origin: Any = self  # a metric by its callbacks, not by its class
        return MetricValue(origin, self.NAME, sum(losses) / max(len(losses), 1), strategy.step)


class Logger(Learner, supports_distributed=True):
    """One of Avalanche's loggers, with the loss of every epoch. Nothing persists."""

    def __init__(self, parameters: catalog.Avalanche) -> None:
        super().__init__()
        self.parameters, self.name = parameters, f"avalanche-{parameters.plugin}"
        self._logger: Any = None
        self._close: Callable[[], None] = lambda: None

    def before_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Open a file or directory per update, and let Avalanche's evaluation plugin feed it; in the first process."""
        if strategy.adapter.backend.rank:
            return
        place = Path(str(self.parameters.parameters["directory"]))
        try:
            place.mkdir(parents=True, exist_ok=True)
            self._logger = self._opened(place, f"update-{strategy.update:05d}")
        except (OSError, ModuleNotFoundError) as error:
            raise Failure("bad_strategy", f"{self.parameters.plugin} cannot log to {place}: {error}") from error
        metric = EpochLoss()
        metric.before_training_exp(strategy)
        strategy.evaluator.metrics.append(metric)
        strategy.evaluator.loggers.append(self._logger)
        strategy.report(self.name, "opened", 1.0)

    def _opened(self, place: Path, update: str) -> Any:
        kind = logger_class(self.parameters.plugin)
        if self.parameters.plugin == "TextLogger":
            file = (place / f"{update}.txt").open("a", encoding="utf-8", buffering=1)
            self._close = file.close
            return kind(file=file)
        logger = kind(str(place / update))
        self._close = getattr(logger, "close", self._close)
        return logger

    def after_training(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The last callback: what the logger still has to say at the end, then its file is closed."""
        if self._logger is None:
            return
        self._logger.after_training(strategy, [])
        strategy.evaluator.loggers.remove(self._logger)
        self._close()


class Schedule(Learner, supports_distributed=True):
    """LRSchedulerPlugin around one of torch's schedulers, in the place of the loop's warm-up and cosine.

    State, for an interrupted run: the scheduler's own. The next update begins its schedule anew.
    """

    name = "avalanche"

    def __init__(self, parameters: catalog.Avalanche) -> None:
        super().__init__()
        self.parameters = parameters
        self.plugin: Any = None

    def before_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Take the learning rate over, from the configured one on."""
        given = dict(self.parameters.parameters)
        kind = getattr(torch.optim.lr_scheduler, str(given.pop("scheduler", "ExponentialLR")))
        granularity: Any = given.pop("step_granularity", "epoch")
        for group in strategy.optimizer.param_groups:
            group["lr"] = strategy.training.learning_rate
            group.pop("initial_lr", None)
        try:
            scheduler = kind(strategy.optimizer, **given)
            self.plugin = LRSchedulerPlugin(scheduler, step_granularity=granularity)
        except (TypeError, ValueError) as error:
            raise Failure("bad_strategy", f"LRSchedulerPlugin with {self.parameters.parameters}: {error}") from error
        strategy.schedules_rate = False

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:  # noqa: ARG002 - no tensors
        """At a checkpoint only: before the loop has begun there is nothing to take over."""
        if self.plugin is not None and notes:
            scheduler = self.plugin.scheduler
            scheduler.load_state_dict(notes)
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """What torch's scheduler says of itself: numbers."""
        return {}, {} if self.plugin is None else dict(self.plugin.scheduler.state_dict())

    def after_training_iteration(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """A step of the schedule, where it goes by iterations."""
        self.plugin.after_training_iteration(strategy)

    def after_training_epoch(self, strategy: Any, *_: Any, **__: Any) -> None:
        """A step of the schedule, where it goes by epochs."""
        self.plugin.after_training_epoch(strategy)
        strategy.report(self.name, "learning_rate", strategy.optimizer.param_groups[0]["lr"])


def avalanche_plugin(parameters: catalog.Avalanche) -> Learner:
    """The plugin that an entry names; the catalog has refused all that do not fit."""
    kinds: dict[str, Callable[[catalog.Avalanche], Learner]] = {
        "LRSchedulerPlugin": Schedule, "EarlyStoppingPlugin": Stopping, "MIRPlugin": InterferedRetrieval,
    }  # fmt: skip
    return kinds.get(parameters.plugin, Logger)(parameters)
