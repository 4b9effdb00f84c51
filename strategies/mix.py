"""What one epoch shows: everything that is new, and of the rest as much as the ratios ask for, others each time.

An update of eight epochs that drew its replayed rows once would show half of a past eight times and the other half not
at all. So the experience brings as many as all epochs together can show, and each epoch takes its part of them, in
turns: no row is seen twice before every other was seen once. The ratio of each epoch is exact, and so its cost.
"""

import random
from collections.abc import Mapping, Sequence

from buffers.experience import Role, beside
from strategies import catalog
from strategies.dataset import Item


def per_epoch(items: Mapping[Role, Sequence[Item]], strategies: Sequence[catalog.Strategy]) -> dict[Role, int]:
    """How many rows of a role an epoch shows; a role that is not named is shown whole."""
    replay = next((each for each in strategies if isinstance(each, catalog.Replay)), None)
    if replay is None:
        return {}
    new = len(items.get("new", ()))
    replayed = min(beside(new, replay.ratio), len(items.get("replay", ())))
    general = min(beside(new + replayed, replay.general_ratio), len(items.get("general", ())))
    counts: dict[Role, int] = {"replay": replayed, "general": general}
    return {role: count for role, count in counts.items() if items.get(role)}


def shown(items: Sequence[Item], counts: Mapping[Role, int], seed: int, epoch: int) -> list[Item]:
    """The rows of an epoch, in the order of `items`; decided by `seed` and `epoch` alone."""
    left_out: set[Item] = set()
    for role, count in counts.items():
        rows = [item for item in items if item.role == role]
        if count < len(rows):
            random.Random(f"{seed}/{role}").shuffle(rows)
            first = epoch * count % len(rows)
            left_out |= set(rows) - {*rows[first : first + count], *rows[: max(first + count - len(rows), 0)]}
    return [item for item in items if item not in left_out]
