"""What a swap takes in the embedded engine, after the gate: stage, commit and flip of SmolLM2's adapter, apart.

    python -m bench.swap                 # medians of 40 swaps
    python -m bench.swap --real-time     # as root: other programs on the machine do not count

The adapter is as the trainer writes it: float32, rank 16 on all linear layers, and a manifest whose hashes are checked.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from serving.engine import Engine, Options
from strategies.adapter import load_adapter
from strategies.request import Lora

ROOT = Path(__file__).resolve().parent.parent
FILES = ("adapter_config.json", "adapter_model.safetensors")


def publish(base: Path, directory: Path, seed: int) -> None:
    """A version whose weights differ with the seed."""
    adapter = load_adapter(base, Lora(rank=16, alpha=32.0, dropout=0.0), seed=seed)
    with torch.no_grad():
        adapter.flat.normal_(0, 1e-3, generator=torch.Generator().manual_seed(seed))
    adapter.save(directory)
    files = {name: {"sha256": hashlib.sha256((directory / name).read_bytes()).hexdigest()} for name in FILES}
    (directory / "manifest.json").write_text(json.dumps({"files": files}))


def swap(engine: Engine, path: Path, number: int) -> dict[str, float]:
    """One version more, the one before it unloaded; milliseconds."""
    began, cpu = time.perf_counter(), time.process_time()
    loaded = engine.load(f"v{number}", str(path))
    ready = time.perf_counter()
    flip = engine.point("npc", f"v{number}", f"v{number - 1}" if number else None)
    served, cpu = time.perf_counter(), time.process_time() - cpu
    if number:
        engine.registry.unload(f"v{number - 1}")
    return {
        "stage": loaded.stage_ms, "commit": loaded.commit_ms, "flip": flip.flip_ms, "flip, all": (served - ready) * 1e3,
        "until served": (served - began) * 1e3, "CPU": cpu * 1e3,
    }  # fmt: skip


def first_of_all() -> None:
    """All threads of this process before those of other programs."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, os.sched_param(20))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / ".cache" / "base" / "smollm2-135m")
    parser.add_argument("--swaps", type=int, default=40)
    parser.add_argument("--real-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("a", "b")]
        for seed, path in enumerate(paths):
            publish(options.base, path, seed)
        engine = Engine(Options(base=options.base, adapter_root=Path(folder), context=256))
        if options.real_time:
            first_of_all()
        rows = [swap(engine, paths[number % 2], number) for number in range(options.swaps + 1)][1:]
        engine.scheduler.stop(10)
        size = (paths[0] / FILES[1]).stat().st_size / 1e6
    print(f"{engine.model.dtype}, {size:.1f} MB, medians of {len(rows)} (95th percentile), ms:")
    for key in rows[0]:
        values = [row[key] for row in rows]
        print(f"  {key:13} {statistics.median(values):8.3f} ({statistics.quantiles(values, n=20)[18]:.3f})")


if __name__ == "__main__":
    main()
