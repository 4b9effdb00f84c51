"""What nodes of a Ray cluster try in the tests of the search: imported there by its name."""

import time
from collections.abc import Callable
from pathlib import Path

from test_search import hill

from strategies.objective import Score
from strategies.search import Try, Unfit, Watch
from strategies.space import Values


def attempts(kind: str, directory: str) -> tuple[Try, Callable[[], None]]:
    """How a node tries, and what ends it there."""
    stopped: list[bool] = []

    def picky(number: int, values: Values, watch: Watch) -> Score:
        if values["x"] > 3:
            raise Unfit("the loss is not finite")
        watch("1:1", 5.0 if number > 6 and values["x"] < -1 else 1.0)
        time.sleep(1.0)  # the answer to the report comes from another process
        if stopped:
            raise InterruptedError("told to stop")
        (Path(directory) / "went-on").mkdir(exist_ok=True)
        (Path(directory) / "went-on" / str(number)).touch()
        return hill(number, values, watch)

    def broken(number: int, values: Values, watch: Watch) -> Score:
        raise FileNotFoundError("no base model")

    def slow(number: int, values: Values, watch: Watch) -> Score:
        time.sleep(0.3)
        return hill(number, values, watch)

    kinds: dict[str, Try] = {"hill": hill, "picky": picky, "broken": broken, "slow": slow}
    return kinds[kind], lambda: stopped.append(True)
