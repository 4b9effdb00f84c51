"""Every method on every backend, two processes against one: `make test-distributed` writes the table of docs/scale.md.

    python tests/distributed_matrix.py DOCS/scale.md [BACKEND ...]

Backends whose package is not installed keep the row that they have (Ray's is made by `make test-ray`, on a cluster of
two raylets that is started for it). Ends with status 1 when a cell is not what one process gives.
"""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from conftest import ROOT, make_tiny_base
from ray_kit import two_raylets
from test_parallel import CELLS, TOLERANCE, difference, many, request

from strategies import train
from strategies.parallel.choice import PAIRS, Executor, Parallel, refusal
from strategies.parallel.launch import command
from strategies.request import read_report

BEGIN, END = "<!-- made by make test-distributed -->\n", "<!-- end -->\n"
LAUNCHERS: dict[str, Executor] = {
    **dict.fromkeys(PAIRS["torchrun"], "torchrun"), "horovod": "horovod", "Ray Train, ddp": "ray",
}  # fmt: skip
"""Row of the table -> what starts its processes."""


def cell(one: Path, two: Path) -> str:
    """Equal within the tolerance, with the largest difference of a LoRA weight; or why not."""
    report = read_report(two)
    if report is None or report.status == "failed":
        return report.reason if report is not None else "no report"
    found = difference(one, two)
    return f"= ({found:.0e})" if found < TOLERANCE else f"differs by {found:.0e}"


def row(name: str, base: Path, work: Path) -> list[str]:
    """The cells of one backend."""
    executor = LAUNCHERS[name]
    backend = "ddp" if executor == "ray" else name
    parallel = Parallel(executor=executor, backend=backend, processes=2)  # type: ignore[arg-type]
    runs = [request(base, work / f"{name}-{method}", method, parallel=parallel) for method in CELLS]
    if executor == "torchrun":
        many(runs)
    else:
        with two_raylets() if executor == "ray" else nullcontext(dict(os.environ)) as environment:
            for run in runs:
                subprocess.run(
                    command(parallel, run), cwd=ROOT, env=environment, capture_output=True, check=False, timeout=900
                )
    return [cell(work / f"one-{method}", run) for method, run in zip(CELLS, runs, strict=True)]


def kept(text: str) -> dict[str, str]:
    """The rows that stand in the table."""
    block = text[text.index(BEGIN) : text.index(END)]
    return {found[1]: found[0] for found in re.finditer(r"^\| (.+?) \|.*$", block, re.MULTILINE)}


def main(page: Path, wanted: list[str]) -> int:
    """Measure, write the table, say whether all that was measured is equal."""
    rows = kept(page.read_text("utf-8"))
    is_equal = True
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        base = make_tiny_base(work / "base")
        for method in CELLS:
            train.main(request(base, work / f"one-{method}", method))
        for name in wanted or LAUNCHERS:
            executor = LAUNCHERS[name]
            parallel = Parallel(executor=executor, backend="ddp" if executor == "ray" else name)  # type: ignore[arg-type]
            reason = refusal(parallel, "cpu", gpu=False)
            if "pip install" in reason:
                print(f"{name}: kept as it was: {reason}")
                continue
            cells = [reason] + ["-"] * (len(CELLS) - 1) if reason else row(name, base, work)
            is_equal &= bool(reason) or all(each.startswith("=") for each in cells)
            rows[name] = f"| {name} | {' | '.join(cells)} |"
            print(rows[name], flush=True)
    head = f"| backend | {' | '.join(CELLS)} |\n|{' --- |' * (len(CELLS) + 1)}\n"
    body = "".join(f"{rows[name]}\n" for name in LAUNCHERS if name in rows)
    text = page.read_text("utf-8")
    page.write_text(text[: text.index(BEGIN) + len(BEGIN)] + head + body + text[text.index(END) :], "utf-8")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
