"""The tables of metrics in `docs/operate.md`: `python -m daemon.web.reference docs/operate.md` makes them anew."""

import sys
from pathlib import Path

from daemon.config.explained import rewrite
from daemon.web.metrics import COUNTED, GAUGES, HOUSE


def reference() -> str:
    """Markdown, out of the metrics themselves."""
    lines = ["| metric | meaning |", "| --- | --- |"]
    lines += [f"| `eternad_{name}` | {meaning} |" for name, meaning in HOUSE]
    lines += [f"| `eternad_{name}_total` | {meaning} |" for name, meaning in COUNTED.items()]
    lines += ["| `eternad_files` (`state`) | Dropped files that are known |"]
    lines += ["| `process_*` | CPU, memory, file descriptors of the daemon |", ""]
    lines += ["| metric | labels | meaning |", "| --- | --- | --- |"]
    for gauge in GAUGES:
        labels = ", ".join(f"`{label}`" for label in gauge.labels)
        lines.append(f"| `eternad_{gauge.name}` | {labels} | {gauge.meaning.replace('||', 'from')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]), reference())
