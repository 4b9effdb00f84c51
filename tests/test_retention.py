"""What may be removed, and what never."""

from pathlib import Path

import pytest

from daemon import retention
from daemon.state.runs import Run, RunState, Version


def version(number: int, state: str = "superseded", parent: int | None = None) -> Version:
    return Version(
        model="npc", number=number, run_id=f"npc-{number:05d}", parent=number - 1 if parent is None else parent,
        state=state, manifest_sha256="", published_at=0.0, activated_at=None, activation=None,
    )  # fmt: skip


def run(number: int, state: RunState = "SUPERSEDED") -> Run:
    return Run(
        id=f"npc-{number:05d}", model="npc", state=state, trigger="manual", reason="", update_number=number,
        parent_version=None, version=None, attempts=0, pid=None, created_at=0.0, updated_at=0.0, cut=None, verdict=None,
    )  # fmt: skip


def numbers(removals: list[retention.Removal]) -> list[int]:
    return sorted(int(removal.path.name) for removal in removals)


def test_only_what_is_old_goes(tmp_path: Path) -> None:
    """Of ten versions the newest three stay."""
    versions = [version(n) for n in range(1, 10)] + [version(10, "live")]
    assert numbers(retention.old_versions(tmp_path, versions, 3, [])) == [1, 2, 3, 4, 5, 6, 7]


def test_the_live_version_and_its_parent_stay_however_old(tmp_path: Path) -> None:
    """After a rollback to version 2 the newer ones are newer, but 2 serves and 1 is the next rollback."""
    versions = [version(1), version(2, "live")] + [version(n, "rolled_back") for n in range(3, 11)]
    assert numbers(retention.old_versions(tmp_path, versions, 3, [])) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("how", ["name", "path"])
def test_what_an_engine_lists_stays(tmp_path: Path, how: str) -> None:
    """By its name or by its directory."""
    versions = [version(n) for n in range(1, 10)] + [version(10, "live")]
    listed = "npc@0004" if how == "name" else str(tmp_path / "0004")
    assert 4 not in numbers(retention.old_versions(tmp_path, versions, 3, [listed]))


def test_half_written_and_unknown_versions_are_leftovers(tmp_path: Path) -> None:
    """What an interrupted publish has left, in either of its two shapes."""
    for name in ("0001", ".0002.tmp", "0003"):
        (tmp_path / "npc" / name).mkdir(parents=True)
    found = retention.leftovers(tmp_path, [version(1)])
    assert [removal.path.name for removal in found] == [".0002.tmp", "0003"]


def test_old_runs_lose_their_bulk_and_keep_their_report(tmp_path: Path) -> None:
    """The numbers of every run stay readable; its rows and its log go; active runs are not touched."""
    runs = [run(number) for number in range(60, 1, -1)] + [run(1, "PUBLISHED")]
    for each in [*runs, run(99)]:
        (tmp_path / each.id).mkdir()
        (tmp_path / each.id / "report.json").write_text("{}")
        (tmp_path / each.id / "experience.jsonl").write_text("x" * 1000)
    freed = sum(retention.remove(removal) for removal in retention.old_runs(tmp_path, runs))
    assert freed == 9 * 1000 + 1002
    assert not (tmp_path / "npc-00099").exists()
    assert not (tmp_path / "npc-00005" / "experience.jsonl").exists()
    assert (tmp_path / "npc-00005" / "report.json").exists()
    assert (tmp_path / "npc-00001" / "experience.jsonl").exists()
    assert (tmp_path / "npc-00060" / "experience.jsonl").exists()
