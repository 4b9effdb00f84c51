"""When to stop an update, and which weights to keep: the best ones on the new hold-out that forget little enough.

What is held out must be able to tell: of facts that are said once it holds *other* facts, which nobody taught. Their
loss is lowest after an early epoch, whose weights know next to nothing; `new_rise` lets the later ones be kept.

Early stopping on the new *and* the old hold-outs: a run that still gains on the new ones may long be forgetting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from strategies.adapter import Adapter
from strategies.dataset import Item
from strategies.forward import token_losses

WATCHED = 32
"""At most so many hold-out examples of each kind are watched: this runs every epoch."""

HIGH_RATE_SHARE = 0.5
"""Of the run's steps: until then the cosine schedule has taken away less than half of the learning rate."""


@dataclass
class EarlyStop:
    """Watches hold-outs at the end of every epoch."""

    new: list[Item]
    old: list[Item]
    patience: int
    """Epochs without a lower loss on `new`; 0: never stop for it."""
    old_rise: float
    """Nats per token by which the loss on `old` may rise."""
    new_rise: float = 0.0
    """Nats per token by which the loss on `new` may lie above its lowest: the latest weights within it are kept."""
    start_old: float | None = None
    best_loss: float | None = None
    """The lowest on `new`."""
    best: Tensor | None = None
    """(parameters,) the weights to keep so far."""
    worse_epochs: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)
    """(loss on new, rise on old) per epoch"""

    def begin(self, adapter: Adapter) -> None:
        """Remember where the old hold-outs start; not again after a resume."""
        self.new, self.old = _spread(self.new), _spread(self.old)
        if self.start_old is None:
            self.start_old = _mean(adapter, self.old)

    def check(self, adapter: Adapter, done: float = 1.0) -> str:
        """Look at the weights after an epoch; the reason to stop, or an empty string.

        `done`: share of the run's steps. In the first half, at a high learning rate, what was known shakes and comes
        back as the rate decays (measured: +0.28 nats after the first of four epochs, -0.18 at the end): such weights
        are not kept, but the run goes on.
        """
        loss, rise = _mean(adapter, self.new), self.rise(adapter)
        self.history.append((loss, rise))
        if rise > self.old_rise:
            if done <= HIGH_RATE_SHARE:
                return ""
            return f"loss on old hold-outs rose by {rise:.3f} nats per token (allowed: {self.old_rise:g})"
        # without a new hold-out the last weights are the best
        if not self.new or self.best_loss is None or loss < self.best_loss + self.new_rise:
            self.best_loss = loss if self.best_loss is None else min(loss, self.best_loss)
            self.best, self.worse_epochs = adapter.flat.clone(), 0
            return ""
        self.worse_epochs += 1
        if self.patience and self.worse_epochs >= self.patience:
            return f"no lower loss on the new hold-out for {self.worse_epochs} epochs (best: {self.best_loss:.3f})"
        return ""

    def rise(self, adapter: Adapter) -> float:
        """Nats per token by which the loss on the old hold-outs lies above its start; 0 without any."""
        return _mean(adapter, self.old) - (self.start_old or 0.0)

    def restore(self, adapter: Adapter) -> None:
        """Put the best weights into the adapter; the present ones stay where none were allowed."""
        if self.best is not None:
            adapter.assign(self.best)


def _spread(items: list[Item]) -> list[Item]:
    """At most `WATCHED` items, evenly spaced."""
    stride = max(-(-len(items) // WATCHED), 1)
    return items[::stride]


def _mean(adapter: Adapter, items: Sequence[Item]) -> float:
    return float(token_losses(adapter, items).mean()) if items else 0.0
