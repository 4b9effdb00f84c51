"""A slow average of all versions: what to fall back on when an update forgets too much.

    average <- average + (1 - d) (weights - average)      weights, average: (parameters,)

The fast weights take an update whole, the average takes a little of each and forgets little (CLS-ER's stable model,
Arani et al., arXiv:2201.12604, there of every step, here of every version). Where the old hold-outs rise by more than
`training.merge_old_loss` under the candidate, and under its mixes if `training.merge_search` is on, the average with
the candidate in it is tried; it becomes the candidate if they rise less under it. The gate judges it like any other.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from strategies import catalog
from strategies.consolidate import slow
from strategies.ewc import on_device
from strategies.learner import JsonNotes, Learner, Loop


class SlowAverage(Learner, supports_distributed=True):
    """State: average (parameters,); notes: updates that are in it."""

    name = "ema"

    def __init__(self, parameters: catalog.SlowAverage) -> None:
        super().__init__()
        self.parameters = parameters
        self.average: Tensor | None = None
        self.updates = 0

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:
        """The average of all versions so far."""
        if tensors:
            self.average, self.updates = tensors["average"], notes["updates"]

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """Nothing before the first version."""
        return ({}, {}) if self.average is None else ({"average": self.average}, {"updates": self.updates})

    def with_candidate(self, candidate: Tensor) -> Tensor:
        """(parameters,) the average once `candidate` is a version."""
        past = None if self.average is None else on_device(self.average, candidate, self.name)
        return slow(past, candidate, self.parameters.decay, self.updates + 1)

    def offer(self, loop: Loop, rise: float, rise_of: Callable[[Tensor], float]) -> None:
        """Make the average the candidate where the old hold-outs rise less under it than by `rise`."""
        offered = self.with_candidate(loop.adapter.flat.detach())
        found = rise_of(offered)
        loop.report(self.name, "old_loss_rise", found)
        loop.report(self.name, "used", float(found < rise))
        if found < rise:
            loop.adapter.flat.copy_(offered)
            loop.adapter.refresh()

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Take the kept weights into the average."""
        self.average = self.with_candidate(strategy.adapter.flat.detach())
        self.updates += 1
        strategy.report(self.name, "updates", self.updates)
