"""Avalanche's own early stopping, in the place of ours: `EarlyStoppingPlugin` on the losses of a hold-out.

The plugin reads a metric of Avalanche's evaluator and keeps `strategy.model.state_dict()`, which would be a copy of the
whole base. It is shown the loop through a view whose model is the adapter's flat vector, and an evaluator that knows
the mean loss of the hold-out before the first epoch and after each, as Avalanche's periodic evaluation would.
"""

import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.evaluate import has_token_loss
from strategies.forward import token_losses
from strategies.lean_avalanche import EarlyStoppingPlugin
from strategies.learner import JsonNotes, Learner

METRIC = "Loss_Stream"


class _FlatModel:
    """What the plugin keeps and puts back: the adapter's weights alone."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter

    def state_dict(self) -> dict[str, Tensor]:
        return {"flat": self._adapter.flat}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._adapter.assign(state["flat"].to(self._adapter.flat.device))


class Stopping(Learner, supports_distributed=True):
    """`EarlyStoppingPlugin`; our own early stopping and its choice of the best weights are off beside it.

    State, for an interrupted run: the best weights, their loss and epoch, and the latest loss.
    """

    name = "avalanche-EarlyStoppingPlugin"

    def __init__(self, parameters: catalog.Avalanche) -> None:
        super().__init__()
        given = dict(parameters.parameters)
        self.stream: Any = str(given.get("val_stream_name", catalog.STREAMS[0]))
        self.plugin: Any = EarlyStoppingPlugin(
            patience=int(given.get("patience", 1)), val_stream_name=self.stream, metric_name=METRIC, mode="min",
            margin=float(given.get("margin", 0.0)),
        )  # fmt: skip
        self.last: float | None = None
        self.began = False

    def before_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The loss that the run begins with: an update that only makes it worse is taken back."""
        self.plugin.before_training_exp(self._view(strategy))
        self.began = True
        self._look(strategy)

    def after_training_epoch(self, strategy: Any, *_: Any, **__: Any) -> None:
        """What the plugin will see before the next epoch."""
        self._look(strategy)

    def before_training_epoch(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The plugin compares, and may put the best weights back and stop the loop."""
        reason = f"EarlyStoppingPlugin: no lower loss on {self.stream} for {self.plugin.patience} epochs"
        self._compare(self._view(strategy, lambda: strategy.stop(reason)))

    def restore(self, strategy: Any) -> None:
        """After the last epoch, which no other follows that would ask: the best weights of all."""
        self._compare(self._view(strategy, epochs=strategy.epoch + 1))
        if self.plugin.best_state is not None:
            _FlatModel(strategy.adapter).load_state_dict(self.plugin.best_state)
            strategy.report(self.name, "best_epoch", float(self.plugin.best_step or 0))
            strategy.report(self.name, "best_loss", float(self.plugin.best_val or 0.0))

    def _compare(self, view: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of a metric that is there: its first value is its first best
            self.plugin.before_training_epoch(view)

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:
        """At a checkpoint only: what was best in another update says nothing about this one."""
        if not self.began or not notes:
            return
        self.plugin.best_state = dict(tensors) or None
        self.plugin.best_val, self.plugin.best_step, self.last = notes["best"], notes["epoch"], notes["last"]

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """Within a run; a version keeps nothing of it."""
        if not self.began:
            return {}, {}
        notes = {"best": self.plugin.best_val, "epoch": self.plugin.best_step, "last": self.last}
        return dict(self.plugin.best_state or {}), notes

    def after_training(self, strategy: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002 - the callback's contract
        """The run is over."""
        self.began = False

    def _look(self, strategy: Any) -> None:
        watched = [item for item in strategy.items[self.stream] if has_token_loss(item)]
        with strategy.adapter.without_dropout(), torch.no_grad():
            self.last = float(token_losses(strategy.adapter, watched).mean()) if watched else None

    def _view(self, strategy: Any, stop: Callable[[], None] = lambda: None, epochs: int | None = None) -> Any:
        """The loop as the plugin may see it; `epochs` done so far, by default those before the present one."""
        known = {} if self.last is None else {f"{METRIC}/eval_phase/{self.stream}": self.last}
        return SimpleNamespace(
            model=_FlatModel(strategy.adapter), evaluator=SimpleNamespace(get_last_metrics=lambda: known),
            clock=SimpleNamespace(train_exp_epochs=strategy.epoch if epochs is None else epochs), stop_training=stop,
        )  # fmt: skip
