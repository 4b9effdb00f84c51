"""Which of an alias's versions answers a request: by weight, and for one player always the same one."""

import hashlib
import random
from collections.abc import Sequence

from daemon.gateway.table import Route, Target


def choose(alias: str, route: Route, key: str | None, rng: random.Random | None = None) -> Target:
    """The target for a request of `key` (a session or user; None: by chance).

    While two versions share an alias a key keeps its version, and when the second one's weight grows only keys of the
    first one move. Another pair of versions splits the keys anew, so that it is not always the same players who try
    what is new.
    """
    if len(route.targets) == 1:
        return route.targets[0]
    point = (rng or random).random() if key is None else _fraction(alias, route.targets, key)
    return _at(route.targets, point)


def is_copied(route: Route, rng: random.Random | None = None) -> bool:
    """Whether this request also goes to the shadow."""
    return route.shadow is not None and (rng or random).random() < route.shadow.weight


def _fraction(alias: str, targets: Sequence[Target], key: str) -> float:
    """A number in [0, 1) that looks random and is always the same for the same words."""
    words = "\0".join([alias, *(target.version for target in targets), key])
    digest = hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)  # 53 bits: a float holds them exactly, so never 1.0


def _at(targets: Sequence[Target], point: float) -> Target:
    left = point * sum(target.weight for target in targets)
    chosen = targets[0]
    for target in targets:
        if target.weight <= 0:
            continue
        chosen = target
        if left < target.weight:
            break
        left -= target.weight
    return chosen
