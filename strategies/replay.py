"""Rehearsal: examples of the past are trained on again, beside the new ones.

Rolnick et al., arXiv:1811.11682. `buffers.experience` has already drawn them, in the exact ratio r = n / (n + new), and
the loop trains on all roles alike. What is left here is to say what the ratio came to: examples differ in length, so
the share of the *label tokens*, by which the loss is averaged, is another one.
"""

from typing import Any

from buffers.experience import Role
from strategies import catalog
from strategies.learner import Learner, Loop

TRAINED: tuple[Role, ...] = ("new", "derived", "replay", "general")


class Rehearsal(Learner, supports_distributed=True):
    """Reports the shares of replayed and general rows among the trained ones. Nothing persists."""

    name = "replay"

    def __init__(self, parameters: catalog.Replay) -> None:
        super().__init__()
        self.parameters = parameters

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """`examples`, `share` and `token_share` of replay, `general_token_share`."""
        rows = {role: strategy.items.get(role, ()) for role in TRAINED}
        tokens = {role: sum(item.label_tokens for item in items) for role, items in rows.items()}
        examples = sum(len(items) for items in rows.values())
        strategy.report(self.name, "examples", len(rows["replay"]))
        strategy.report(self.name, "share", len(rows["replay"]) / max(examples, 1))
        strategy.report(self.name, "token_share", tokens["replay"] / max(sum(tokens.values()), 1))
        strategy.report(self.name, "general_token_share", tokens["general"] / max(sum(tokens.values()), 1))
