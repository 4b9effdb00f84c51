"""Rehearsal: examples of the past are trained on again, beside the new ones.

Rolnick et al., arXiv:1811.11682. `buffers.experience` has already drawn them, `strategies.mix` shows them in the exact
ratio r = n / (n + new), and the loop trains on all roles alike. What is left here is to say what the ratio came to:
examples differ in length, so the share of the *label tokens*, by which the loss is averaged, is another one.
"""

from collections.abc import Sequence
from typing import Any

from buffers.experience import Role
from strategies import catalog
from strategies.dataset import Item
from strategies.learner import Learner, Loop
from strategies.mix import per_epoch

TRAINED: tuple[Role, ...] = ("new", "derived", "replay", "general")


class Rehearsal(Learner, supports_distributed=True):
    """Reports the shares of replayed and general rows among the trained ones. Nothing persists."""

    name = "replay"

    def __init__(self, parameters: catalog.Replay) -> None:
        super().__init__()
        self.parameters = parameters

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Of an epoch: `examples`, `share` and `token_share` of replay, `general_token_share`; `different` in all."""
        rows = {role: strategy.items.get(role, ()) for role in TRAINED}
        counts = {role: len(items) for role, items in rows.items()} | per_epoch(rows, [self.parameters])
        tokens = {role: _label_tokens(items) * counts[role] / max(len(items), 1) for role, items in rows.items()}
        strategy.report(self.name, "examples", counts["replay"])
        strategy.report(self.name, "different", len(rows["replay"]))
        strategy.report(self.name, "share", counts["replay"] / max(sum(counts.values()), 1))
        strategy.report(self.name, "token_share", tokens["replay"] / max(sum(tokens.values()), 1))
        strategy.report(self.name, "general_token_share", tokens["general"] / max(sum(tokens.values()), 1))


def _label_tokens(items: Sequence[Item]) -> int:
    return sum(item.label_tokens for item in items)
