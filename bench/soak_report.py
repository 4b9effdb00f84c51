"""Figures and picture of a soak: least-squares slopes, what was missed, three panels over the hours."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.pictures import lines

BEGIN, END = "<!-- written by bench.soak: begin -->", "<!-- end of the soak -->"
WARM_UP_SHARE = 0.125
"""Of the samples: caches fill and modules are imported at first use; the slope is taken of what follows."""


class Sample(msgspec.Struct, frozen=True):
    """The daemon at one moment."""

    at: float
    rss_kib: int
    anonymous_kib: int
    """Part of `rss_kib` that is no file: what a leak would be in."""
    descriptors: int
    threads: int
    cpu_seconds: float
    written: int
    """Feedback records written by the feed so far."""
    stored: int
    """Of them, in the database."""
    runs: dict[str, int]
    """By state."""


def read_samples(path: Path) -> list[Sample]:
    """All of one soak."""
    return [msgspec.json.decode(line, type=Sample) for line in path.read_bytes().splitlines()]


def slope_per_hour(moments: Sequence[float], values: Sequence[float]) -> float:
    """Least squares, per hour. `moments`: seconds."""
    middle, mean = sum(moments) / len(moments), sum(values) / len(values)
    spread = sum((moment - middle) ** 2 for moment in moments)
    together = sum((moment - middle) * (value - mean) for moment, value in zip(moments, values, strict=True))
    return 3600 * together / spread


def figures(samples: Sequence[Sample], interval_seconds: float) -> list[tuple[str, str]]:
    """Name and value of everything that the soak must show."""
    warm = samples[int(len(samples) * WARM_UP_SHARE) :]
    moments, first, last = [each.at for each in warm], warm[0], samples[-1]
    seconds = last.at - samples[0].at
    served = sum(last.runs.get(state, 0) for state in ("LIVE", "SUPERSEDED"))
    begun, due = sum(last.runs.values()), int(seconds // interval_seconds)
    worst = max(each.written - each.stored for each in samples)
    descriptors = sorted(each.descriptors for each in warm)
    cpu = (last.cpu_seconds - first.cpu_seconds) / (last.at - first.at)
    return [
        ("length", f"{seconds / 60:.0f} min, a run every {interval_seconds / 60:.0f} min"),
        ("records written / in the database", f"{last.written:,} / {last.stored:,} ({last.written / seconds:.0f}/s)"),
        ("records not in the database yet, at most", f"{worst:,}"),
        ("runs due / begun / live in the end", f"{due} / {begun} / {served}"),
        ("runs that failed, were rejected or missed", f"{begun - served - at_work(last) + max(0, due - begun)}"),
        ("RSS", f"{warm[0].rss_kib / 1024:.1f} MiB after the warm-up, {last.rss_kib / 1024:.1f} MiB in the end"),
        ("slope of RSS", f"{slope_per_hour(moments, [each.rss_kib / 1024 for each in warm]):+.2f} MiB/h"),
        (
            "slope of its anonymous part",
            f"{slope_per_hour(moments, [each.anonymous_kib / 1024 for each in warm]):+.2f} MiB/h",
        ),
        ("descriptors", f"{descriptors[len(descriptors) // 2]} in the median, {descriptors[-1]} at most"),
        ("slope of the descriptors", f"{slope_per_hour(moments, [float(each.descriptors) for each in warm]):+.2f}/h"),
        ("threads", f"{min(each.threads for each in warm)} to {max(each.threads for each in warm)}"),
        ("CPU of the daemon", f"{100 * cpu:.1f} % of one"),
    ]  # fmt: skip


def at_work(last: Sample) -> int:
    """Runs that had not ended when the soak did."""
    return sum(last.runs.get(state, 0) for state in ("PENDING", "TRAINING", "TRAINED", "EVALUATING", "PUBLISHED"))


def write_page(samples: Sequence[Sample], interval_seconds: float, docs: Path) -> str:
    """The figures into `operate.md`, the picture beside it; returns the table."""
    table = "\n".join(
        ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in figures(samples, interval_seconds))]
    )
    page = docs / "operate.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    minutes = [(each.at - samples[0].at) / 60 for each in samples]
    panels = {
        "RSS of the daemon, MiB": [each.rss_kib / 1024 for each in samples],
        "open descriptors": [float(each.descriptors) for each in samples],
        "runs that went live": [float(each.runs.get("LIVE", 0) + each.runs.get("SUPERSEDED", 0)) for each in samples],
    }
    (docs / "soak.svg").write_text(lines(panels, minutes, "minutes"))
    return table
