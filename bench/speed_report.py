"""The speed bench's findings and the part of `docs/performance.md` that is written from them."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from bench.peers.work import Result
from bench.pictures import bars

BEGIN, END = "<!-- written by bench.speed: begin -->", "<!-- end -->"
OURS = "eternad"
MEGAFLOP_PER_TOKEN = 584.0
"""SmolLM2-135M, rank 16 on all linear layers, documents of about 130 tokens: 4 x linears (106.2 M: forward and dx) +
4 x head (28.3 M) + 6 x LoRA (4.88 M) + attention. The frozen weights need no gradient."""
TOLERANCE = 0.1
"""Nats by which a loss of the first two steps may differ: bfloat16 lags float32 by 0.03-0.09 at first."""


class Overhead(msgspec.Struct, frozen=True, kw_only=True):
    """A strategy beside naive training."""

    ratio: float
    """Median over pairs of CPU seconds per step: protected / naive."""
    step_seconds: float
    """CPU seconds of a protected step."""
    extra_bytes: int
    """Peak memory beyond naive training's."""
    first_losses: list[float]
    """Naive and protected, first step: the same documents."""
    failure: str = ""
    """Why there are no figures."""

    @property
    def added_seconds(self) -> float:
        """What the strategy adds to a step."""
        return self.step_seconds * (1 - 1 / self.ratio)


class Findings(msgspec.Struct, kw_only=True):
    """Everything that one run measured."""

    date: str
    processor: str
    load: list[float]
    """Load averages at the start: 1, 5 and 15 minutes."""
    versions: dict[str, str]
    rounds: int
    base: str
    gemm: list[dict[str, float]] = []
    """FLOP per CPU second by precision, one per round."""
    trainers: dict[str, list[Result]] = {}
    strategies: dict[str, Overhead] = {}
    shipped: dict[str, Overhead] = {}
    """Avalanche's own plugins, by the name of our strategy."""
    skipped: list[str] = []
    """What there was no time for, or what failed."""
    numbers: dict[str, float] = {}
    """Fixed costs by name: seconds, or what the name says."""


WANTED = {
    "spawn to first step": 12.0, "last step to report": 5.0, "last step to served": 5.0, "import of the trainer": 6.0,
    "import of the daemon": 0.5, "installed, bytes": 1.6e9, "eternad status": 0.3, "daemon idle, % of a CPU": 0.2,
    "daemon, resident bytes": 80 * 2.0**20, "feedback, records per second": 15000.0,
}  # fmt: skip
"""Seconds and so on at most; records at least."""
BOUNDS = {"ewc": 1.05, "replay": 1.0, "distill": None, "agem": 2.1, "gem": 3.0}
"""Wanted ratio of a step's time to naive training's; GEM with two constraints."""


def rate(results: Sequence[Result]) -> float:
    """Median real tokens per CPU second."""
    return statistics.median(result.tokens_per_cpu_second for result in results)


def ratio(findings: Findings, title: str) -> float:
    """How many times faster we are than `title`: median over the rounds of both."""
    pairs = zip(findings.trainers[OURS], findings.trainers[title], strict=False)
    return statistics.median(ours.tokens_per_cpu_second / its.tokens_per_cpu_second for ours, its in pairs)


def memory(results: Sequence[Result]) -> float:
    """Median peak, bytes."""
    return statistics.median(result.peak_bytes for result in results)


def agrees(findings: Findings, title: str) -> bool | None:
    """Whether the losses of the first two steps are ours; None where the batches are cut differently."""
    theirs, ours = findings.trainers[title][0], findings.trainers[OURS][0]
    if theirs.notes.get("own_batches"):
        return None
    return all(abs(a - b) <= TOLERANCE for a, b in zip(theirs.losses[:2], ours.losses[:2], strict=True))


def trainer_lines(findings: Findings) -> Iterator[str]:
    """The table of trainers; ours first."""
    yield (
        "| trainer | real tokens per CPU second | per second | eternad is faster by | peak memory | eternad needs |"
        " of the bf16 GEMM peak | losses of steps 1, 2 |"
    )
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    own_memory = memory(findings.trainers[OURS])
    peak = statistics.median(each["bfloat16"] for each in findings.gemm) if findings.gemm else 0.0
    for title, results in findings.trainers.items():
        share = f"{100 * rate(results) * MEGAFLOP_PER_TOKEN * 1e6 / peak:.0f} %" if peak else "-"
        wall = statistics.median(result.tokens_per_second for result in results)
        losses = ", ".join(f"{loss:.3f}" for loss in results[0].losses[:2])
        mark = {True: "", False: " (differ)", None: " (own batches)"}[agrees(findings, title)]
        yield (
            f"| {title} | {rate(results):.0f} | {wall:.0f} | {ratio(findings, title):.2f}x |"
            f" {memory(results) / 1e9:.2f} GB | {own_memory / memory(results):.2f}x | {share} | {losses}{mark} |"
        )


def strategy_lines(findings: Findings) -> Iterator[str]:
    """The table of strategies, with what Avalanche's own plugin adds beside ours."""
    yield (
        "| strategy | step time, naive = 1 | wanted at most | adds to a step | extra peak memory |"
        " Avalanche's own adds to a step | its extra peak memory |"
    )
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, found in findings.strategies.items():
        bound = BOUNDS.get(name)
        yield (
            f"| {name} | {found.ratio:.3f} | {bound or '-'} | {1e3 * max(found.added_seconds, 0.0):.0f} ms |"
            f" {max(found.extra_bytes, 0) / 1e6:.0f} MB | {shipped_cells(findings.shipped.get(name))} |"
        )


def shipped_cells(found: Overhead | None) -> str:
    """Two cells: added time and memory of a shipped plugin, or why there are none."""
    if found is None:
        return "- | -"
    if found.failure:
        return f"fails: {found.failure.replace('|', '/')} | -"
    return f"{1e3 * max(found.added_seconds, 0.0):.0f} ms | {max(found.extra_bytes, 0) / 1e6:.0f} MB"


def number_lines(findings: Findings) -> Iterator[str]:
    """The fixed costs and what the daemon's users meet."""
    yield "| what | | wanted | |"
    yield "| --- | ---: | ---: | --- |"
    for name, value in findings.numbers.items():
        wanted = WANTED.get(name)
        if wanted is None:
            yield f"| {name} | {shown(name, value)} | | |"
            continue
        least = "per second" in name
        answer = "met" if (value >= wanted if least else value <= wanted) else "not met"
        yield f"| {name} | {shown(name, value)} | {'>=' if least else '<='} {shown(name, wanted)} | {answer} |"


def shown(name: str, value: float) -> str:
    """With the unit that the name asks for; seconds where it asks for none."""
    if "bytes" in name:
        return f"{value / 1e9:.2f} GB" if value > 5e8 else f"{value / 2**20:.0f} MiB"
    if "per" in name.split():
        return f"{value:,.0f}"
    if "%" in name:
        return f"{value:.3f} %"
    return f"{value:.2f}" + (" ms" if name.endswith(" ms") else " s")


def verdicts(findings: Findings) -> Iterator[str]:
    """The targets and what was reached, in the order of the page."""
    peers = [title for title in findings.trainers if title != OURS]
    best = min((ratio(findings, title) for title in peers if title.startswith("TRL")), default=None)
    default = next((ratio(findings, title) for title in peers if title.startswith("HF")), None)
    least = min((memory(findings.trainers[title]) for title in peers), default=None)
    yield verdict("speed against the best TRL setting", best, 2.0)
    yield verdict("speed against HF Trainer's defaults", default, 4.0)
    yield verdict("peak memory against the leanest peer", least and memory(findings.trainers[OURS]) / least, 0.5, True)


def verdict(what: str, value: float | None, target: float, at_most: bool = False) -> str:
    """One target."""
    if value is None:
        return f"- {what}: not measured"
    met = value <= target if at_most else value >= target
    return f"- {what}: **{value:.2f}x** (target: {'<=' if at_most else '>='} {target}x, {'met' if met else 'not met'})"


def text_of(findings: Findings) -> str:
    """What stands between the markers."""
    counts = [len(results) for results in findings.trainers.values()] or [findings.rounds]
    rounds, most = min(counts), max(counts)
    about = (
        f"Measured {findings.date} on {findings.processor}, load average at the start"
        f" {' '.join(f'{value:.1f}' for value in findings.load)}, one thread,"
        f" {rounds} round{'s' * (rounds > 1)} in turn{' (the fastest: ' + str(most) + ')' if most > rounds else ''};"
        f" {', '.join(f'{name} {number}' for name, number in findings.versions.items())}."
    )
    parts = [about]
    if OURS in findings.trainers:
        peaks = ", ".join(
            f"{name} {statistics.median(each[name] for each in findings.gemm) / 1e9:.0f}"
            for name in ("bfloat16", "float32") if findings.gemm
        )  # fmt: skip
        parts += ["\n".join(verdicts(findings)), "\n".join(trainer_lines(findings))]
        parts += [f"GEMM peak on the same thread, GFLOP/s: {peaks}.", "![Trainers](performance.svg)"]
    if findings.strategies:
        parts += ["### Strategies", "\n".join(strategy_lines(findings))]
    if findings.numbers:
        parts += ["### Fixed costs", "\n".join(number_lines(findings))]
    if findings.skipped:
        parts.append(f"Not measured this time: {'; '.join(findings.skipped)}.")
    return "\n\n".join(parts)


def write_page(findings: Findings, docs: Path) -> Path:
    """Replace what stands between the markers of `docs/performance.md`; the picture lies beside it."""
    page = docs / "performance.md"
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{text_of(findings)}\n\n{END}{after}", "utf-8")
    if findings.trainers:
        rates = {title: rate(results) for title, results in findings.trainers.items()}
        (docs / "performance.svg").write_text(bars("real tokens per CPU second, one core", rates), "utf-8")
    return page
