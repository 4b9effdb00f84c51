"""Places where a test may kill the process: `ETERNAD_FAILPOINT=NAME[#n]` kills at the n-th time NAME is reached.

Off by default; `reach` costs one dictionary look-up. Names are `STATE:before` and `STATE:after` of the run states.
"""

import os
import signal
from collections import Counter

_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """SIGKILL this process here when the environment says so."""
    wanted = os.environ.get("ETERNAD_FAILPOINT")
    if not wanted:
        return
    target, _, times = wanted.partition("#")
    _reached[name] += 1
    if name == target and _reached[name] == int(times or 1):
        os.kill(os.getpid(), signal.SIGKILL)
