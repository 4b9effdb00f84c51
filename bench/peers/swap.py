"""The embedded engine takes over a new adapter: stage (beside requests), commit (between two steps), flip the alias."""

import statistics
import tempfile
import time
from pathlib import Path

from bench.peers.ours import adapter_of
from bench.peers.work import Work, child
from serving.engine import Engine, Options

SWAPS = 15


def measure(work: Work, _: str) -> dict[str, float]:
    """Medians over `SWAPS` swaps, milliseconds."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        adapter_of(work).save(root / "v1")
        engine = Engine(Options(base=Path(work.base), adapter_root=root, context=256))
        try:
            return swaps(engine, root)
        finally:
            engine.scheduler.stop(10)


def swaps(engine: Engine, root: Path) -> dict[str, float]:
    """Load, point, unload the one before; the first round warms up."""
    stage, commit, flip = [], [], []
    for number in range(SWAPS + 1):
        loaded = engine.load(f"v{number}", str(root / "v1"))
        began = time.perf_counter()
        engine.point("npc", f"v{number}", f"v{number - 1}" if number else None)
        flip.append((time.perf_counter() - began) * 1e3)
        stage.append(loaded.stage_ms)
        commit.append(loaded.commit_ms)
        if number:
            engine.registry.unload(f"v{number - 1}")
    return {
        f"swap, {name}": statistics.median(values[1:])
        for name, values in (("stage ms", stage), ("commit ms", commit), ("flip ms", flip))
    }


if __name__ == "__main__":
    child(measure)
