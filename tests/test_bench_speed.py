"""The speed bench on the tiny model: same data for everybody, losses that agree, a page that says what was found."""

import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from bench.peers import avalanche_naive, avalanche_plugins, gemm, ours, overhead, service, swap, work
from bench.peers.documents import LENGTHS, batches
from bench.peers.work import Mark, Result, Work
from bench.speed import Bench, main, parser, run_child
from bench.speed_report import (
    BEGIN,
    END,
    Findings,
    Overhead,
    agrees,
    number_lines,
    ratio,
    shipped_cells,
    text_of,
    write_page,
)
from daemon import config as configuration
from strategies.dataset import batches as shuffled

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def small(tiny_base: Path) -> Work:
    """Two steps of three short documents."""
    made = batches(tiny_base, ROOT / "examples" / "biblioteca" / "general", 2, lengths=(9, 14, 30))
    return Work(base=str(tiny_base), batches=made, rank=4, alpha=8.0)


def test_every_batch_has_the_same_lengths(tiny_base: Path) -> None:
    """Else the steps of a slow trainer that does fewer could not be compared; 47 % of a padded batch is real."""
    made = batches(tiny_base, ROOT / "examples" / "biblioteca" / "general", 3)
    assert [sorted(map(len, batch)) for batch in made] == [sorted(LENGTHS)] * 3
    assert made == batches(tiny_base, ROOT / "examples" / "biblioteca" / "general", 3)
    assert sum(LENGTHS) / (len(LENGTHS) * max(LENGTHS)) == pytest.approx(0.47, abs=0.005)


def test_our_loop_takes_the_documents_in_the_peers_order() -> None:
    """The loop's shuffle is undone beforehand."""
    items = ours.items_of([[random.randrange(9)] * 3 for _ in range(23)])
    again = [item for batch in shuffled(ours.unshuffled(items, seed=5), 4, seed=5, epoch=0) for item in batch]
    assert again == items


def test_losses_of_the_first_steps_agree_with_the_plain_padded_loop(small: Work) -> None:
    """Ours without padding and Avalanche's own loop with it: the same losses before and after a step."""
    mine, plain = ours.measure(small, ""), avalanche_naive.measure(small, "")
    assert mine.losses == pytest.approx(plain.losses, abs=0.02)
    assert mine.losses[0] != pytest.approx(mine.losses[1], abs=1e-4)
    assert mine.timed_tokens == plain.timed_tokens == 9 + 14 + 30


@pytest.mark.parametrize("name", ["ewc", "replay", "distill", "agem", "gem"])
def test_a_strategy_is_measured_on_the_documents_of_the_naive_phase(small: Work, name: str) -> None:
    """The first losses are the same up to what distillation adds, which is nothing at a fresh adapter."""
    found = overhead.measure(small, name)
    assert found.ratio > 0
    assert found.first_losses[0] == pytest.approx(found.first_losses[1], abs=0.02)


@pytest.mark.parametrize("name", ["ewc", "agem"])
def test_avalanches_own_plugins_run_beside_its_naive(small: Work, name: str) -> None:
    """In the second experience, where they act; the first losses of both are those of one trained model."""
    found = avalanche_plugins.measure(small, name)
    assert found.failure == "" and found.ratio > 0
    assert found.first_losses[0] == pytest.approx(found.first_losses[1], abs=0.05)


def test_a_shipped_plugin_that_fails_says_why(small: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """A-GEM as it ships loses its memory loader when there are more past experiences than samples."""

    def broken(_: str) -> None:
        raise ValueError("batch_size should be a positive integer value, but got batch_size=0")

    monkeypatch.setattr(avalanche_plugins, "plugin", broken)
    found = avalanche_plugins.measure(small, "agem")
    assert found.failure.startswith("ValueError: batch_size should be")


def test_a_file_is_dropped_whole_and_the_daemons_rows_are_read(tiny_base: Path, tmp_path: Path) -> None:
    """Nothing partial is ever visible under its name; before there is a database there are no rows."""
    place = service.Place(tmp_path)
    place.drop("content/book/porter/facts.jsonl", [b"one\n", b"two\n"])
    assert (tmp_path / "library/content/book/porter/facts.jsonl").read_bytes() == b"one\ntwo\n"
    assert place.ask("SELECT 1 FROM run") == []
    text = service.CONFIG.format(port=9, base=tiny_base, general=tmp_path)
    (tmp_path / "eternad.toml").write_text(text, "utf-8")
    assert set(configuration.load(tmp_path / "eternad.toml").models) == {"npc", "book"}
    with pytest.raises(TimeoutError, match="for the moon"):
        service.until(lambda: False, "the moon", seconds=0.01)


def test_a_swap_is_timed(small: Work) -> None:
    """Stage, commit and flip each take some time."""
    assert {name: value > 0 for name, value in swap.measure(small, "").items()} == {
        "swap, stage ms": True, "swap, commit ms": True, "swap, flip ms": True,
    }  # fmt: skip


def test_the_peak_of_products_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a megaflop per second, less than a petaflop."""
    monkeypatch.setattr(gemm, "SIZE", 256)
    assert 1e6 < gemm.rate(torch.float32) < 1e15


def test_the_peak_of_memory_can_be_forgotten() -> None:
    """What was used before does not count for what comes after."""
    block = mmap.mmap(-1, 120_000_000)  # goes back to the system at once, unlike an allocator's memory
    block[::4096] = bytes(len(range(0, len(block), 4096)))
    high = work.peak_bytes()
    work.forget_peak()
    assert work.peak_bytes() > 100_000_000
    block.close()
    work.forget_peak()
    assert work.peak_bytes() < high - 50_000_000


def result(tokens_per_second: float, loss: float, peak: int) -> Result:
    """Two steps, 100 tokens in the second."""
    end = 100 / tokens_per_second
    return Result(
        marks=[Mark(cpu=0, wall=0, loss=loss), Mark(cpu=end, wall=2 * end, loss=loss)],
        timed_tokens=100,
        peak_bytes=peak,
    )


@pytest.fixture
def findings() -> Findings:
    """Ours three times as fast as TRL; HF's losses are wrong."""
    return Findings(
        date="2026-11-22", processor="some CPU", load=[1.0, 2.0, 3.0], versions={"torch": "2"}, rounds=1, base="tiny",
        gemm=[{"bfloat16": 4e11, "float32": 1e11}],
        trainers={"eternad": [result(300, 3.0, 10**9)], "TRL, best": [result(100, 3.05, 3 * 10**9)],
                  "HF Trainer": [result(50, 4.0, 4 * 10**9)]},
        strategies={"ewc": Overhead(ratio=1.01, step_seconds=1, extra_bytes=10**6, first_losses=[3.0, 3.0])},
        numbers={"spawn to first step": 7.5, "installed, bytes": 1.5e9},
    )  # fmt: skip


def test_figures_have_their_units_and_targets(findings: Findings) -> None:
    """Seconds at most, records at least; a plugin's cells say time and memory, or why it fails."""
    findings.numbers |= {
        "feedback, records per second": 9_580.0,
        "daemon idle, % of a CPU": 0.133,
        "swap, flip ms": 0.2,
    }
    lines = list(number_lines(findings))
    assert "| spawn to first step | 7.50 s | <= 12.00 s | met |" in lines
    assert "| installed, bytes | 1.50 GB | <= 1.60 GB | met |" in lines
    assert "| feedback, records per second | 9,580 | >= 15,000 | not met |" in lines
    assert "| swap, flip ms | 0.20 ms | | |" in lines
    slow = Overhead(ratio=2.0, step_seconds=1.0, extra_bytes=10**9, first_losses=[])
    assert shipped_cells(slow) == "500 ms | 1000 MB"
    assert shipped_cells(msgspec.structs.replace(slow, failure="it | breaks")) == "fails: it / breaks | -"


def test_a_child_that_is_ended_cleans_up(small: Work, tmp_path: Path) -> None:
    """SIGTERM leaves through its `finally`, where a service would be stopped; too little time gives no result."""
    (tmp_path / "work.json").write_bytes(msgspec.json.encode(small))
    slow = (
        "import pathlib, time\nfrom bench.peers.work import child\n"
        "def measure(*_):\n    try:\n        pathlib.Path('begun').touch()\n        time.sleep(600)\n"
        "    finally:\n        pathlib.Path('ended').touch()\n"
        "child(measure)\n"
    )
    command = [sys.executable, "-c", slow, str(tmp_path / "work.json"), "result.json"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    service.until((tmp_path / "begun").exists, "the child")
    process.terminate()
    assert process.wait() == 143 and (tmp_path / "ended").exists()
    assert run_child(Path(sys.executable), "swap", small, seconds=0.01) is None


def test_what_there_is_no_time_for_is_named(tiny_base: Path, tmp_path: Path) -> None:
    """No child begins that would not end in time, and the page says what is missing."""
    bench = Bench(tiny_base, ROOT / "examples" / "biblioteca" / "general", 1, True, tmp_path / "copy.json", minutes=0.0)
    bench.swap()
    bench.strategies()
    assert bench.findings.skipped[:2] == ["swap", "overhead ewc"]
    assert "Not measured this time: swap; overhead ewc;" in text_of(bench.findings)


def test_a_call_adds_to_what_calls_before_have_measured(
    tiny_base: Path, tmp_path: Path, findings: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, between other work: tables of earlier parts stay, and what is made up for is no longer missing."""
    findings.skipped = ["swap", "service"]
    kept, docs = tmp_path / "kept.json", tmp_path / "docs"
    kept.write_bytes(msgspec.json.encode(findings))
    docs.mkdir()
    (docs / "performance.md").write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr("bench.speed.run_child", lambda *given: b'{"swap, flip ms": 0.25}')
    general = str(ROOT / "examples" / "biblioteca" / "general")
    given = ["--base", str(tiny_base), "--general", general, "--parts", "swap", "--json", str(kept), "--add"]
    main([*given, "--docs", str(docs)])
    page = (docs / "performance.md").read_text()
    assert "swap, flip ms | 0.25 ms" in page and "| TRL" in page
    assert "Not measured this time: service." in page


def test_ratios_and_agreement(findings: Findings) -> None:
    """Faster by the ratio of tokens per CPU second; losses further apart than the tolerance are called out."""
    assert ratio(findings, "TRL, best") == pytest.approx(3.0)
    assert agrees(findings, "TRL, best") is True
    assert agrees(findings, "HF Trainer") is False


def test_the_page_keeps_its_prose(findings: Findings, tmp_path: Path) -> None:
    """Only what stands between the markers is replaced, however often."""
    (tmp_path / "performance.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", "utf-8")
    for _ in range(2):
        write_page(findings, tmp_path)
    text = (tmp_path / "performance.md").read_text("utf-8")
    assert text.startswith("before\n" + BEGIN)
    assert text.endswith(END + "\nafter\n")
    assert "old" not in text
    assert "**3.00x** (target: >= 2.0x, met)" in text
    assert "4.000, 4.000 (differ)" in text
    assert (tmp_path / "performance.svg").read_text("utf-8").count("<rect") == 4


def test_findings_travel_as_json(findings: Findings) -> None:
    """`--json` loses nothing."""
    assert msgspec.json.decode(msgspec.json.encode(findings), type=Findings) == findings


def test_the_page_of_the_repository_has_its_markers() -> None:
    """The bench would not know where to write."""
    assert parser().parse_args([]).docs == ROOT / "docs"
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert text.index(BEGIN) < text.index(END)
