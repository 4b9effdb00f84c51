"""The soak's own arithmetic and feed: what it drops is accepted, and a leak or a missed run would show."""

import json
from pathlib import Path

import pytest

from bench.soak_feed import LEARNED_EVERY, Feed, record
from bench.soak_report import Sample, figures, slope_per_hour, write_page
from daemon.ingest import feedback

INTERVAL = 300.0


def samples(*, leak_kib: float = 0.0, live: int = 24) -> list[Sample]:
    """Two hours, one sample every ten seconds; the resident size grows by `leak_kib` each time."""
    return [
        Sample(
            at=1e9 + 10 * n, rss_kib=60_000 + int(leak_kib * n), anonymous_kib=40_000, descriptors=18 + n % 2,
            threads=10, cpu_seconds=n / 100, written=5000 * n, stored=5000 * n - 100 * (n > 0),
            runs={"SUPERSEDED": live - 1, "LIVE": 1} if n > 700 else {},
        )
        for n in range(721)
    ]  # fmt: skip


def test_a_slope_is_per_hour_and_of_all_points() -> None:
    """A straight line gives its slope, whatever the moments' origin."""
    assert slope_per_hour([1e9, 1e9 + 1800, 1e9 + 3600], [1.0, 2.0, 3.0]) == pytest.approx(2.0)


def test_a_leak_and_a_missed_run_show() -> None:
    """1 KiB every ten seconds is 0.35 MiB an hour; 22 runs of 24 are two missed."""
    table = dict(figures(samples(), INTERVAL))
    assert (table["slope of RSS"], table["runs that failed, were rejected or missed"]) == ("+0.00 MiB/h", "0")
    table = dict(figures(samples(leak_kib=1.0, live=22), INTERVAL))
    assert (table["slope of RSS"], table["runs that failed, were rejected or missed"]) == ("+0.35 MiB/h", "2")


def test_the_page_keeps_what_stands_around_the_figures(tmp_path: Path) -> None:
    """Only what is between the markers is replaced; the picture lies beside the page."""
    page = tmp_path / "operate.md"
    page.write_text("before\n<!-- written by bench.soak: begin -->\nold\n<!-- end of the soak -->\nafter\n")
    table = write_page(samples(), INTERVAL, tmp_path)
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    assert table in page.read_text() and "old" not in page.read_text()
    assert (tmp_path / "soak.svg").read_text().count("<polyline") == 3


def test_every_record_of_the_feed_is_accepted() -> None:
    """Telemetry teaches nothing; thumbs and demonstrations become an example each."""
    taught = []
    for number in range(6 * LEARNED_EVERY):
        read = feedback.read(json.loads(json.dumps(record(number, 1.8e9))), "npc")
        taught += feedback.examples_of(read)
    assert len(taught) == 6


def test_the_feed_rotates_and_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five minutes a file, and none older than twenty."""
    moment = [0.0]
    monkeypatch.setattr("bench.soak_feed.time.monotonic", lambda: moment[0])
    feed = Feed(tmp_path, rate=1.0)
    for minute in range(0, 61, 5):
        moment[0] = 60.0 * minute
        feed.top_up()
    files = sorted((tmp_path / "feedback" / "npc" / "game").iterdir())
    assert feed.written == 3600
    assert [path.name for path in files] == [f"events-{60 * minute:06d}.jsonl" for minute in range(40, 61, 5)]
