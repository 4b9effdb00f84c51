"""Rewording as a strategy: `strategies.derive` makes the rows before the training, they are counted here."""

from typing import Any

from strategies import catalog
from strategies.learner import Learner, Loop


class Rewriting(Learner, supports_distributed=True):
    """Reports how many derived rows there are, and their share of the label tokens. Nothing persists."""

    name = "rewrite"

    def __init__(self, parameters: catalog.Rewrite) -> None:
        super().__init__()
        self.parameters = parameters

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """`examples` and `token_share` of the derived rows beside the new ones."""
        derived, new = (strategy.items.get(role, ()) for role in ("derived", "new"))
        tokens = [sum(item.label_tokens for item in items) for items in (derived, new)]
        strategy.report(self.name, "examples", len(derived))
        strategy.report(self.name, "token_share", tokens[0] / max(sum(tokens), 1))
