"""Backup beside a running daemon, restore after a disaster: what was served is served again, and nothing is lost."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults_kit import Make, engine_fixture, lab_fixture, make_fixture, state_of
from kill_kit import write_drop
from operator_kit import config_fixture, eternad_fixture, state_fixture
from service_kit import MemoryEngine, turn_until

from buffers import journal
from daemon import backup
from daemon.backup import CannotRestore
from daemon.service import process
from daemon.state import audit, integrity, runs
from daemon.state.database import set_setting, transaction

Eternad = Any
fixtures = (config_fixture, state_fixture, eternad_fixture, engine_fixture, lab_fixture, make_fixture)


def test_after_a_disaster_the_backup_serves_and_later_drops_are_learned_again(
    make: Make, engine: MemoryEngine, tmp_path: Path
) -> None:
    """Taken while the daemon runs; the database is lost; version 1 serves again, and what came since is re-ingested."""
    service = make()
    service.start()
    write_drop(tmp_path, "a.jsonl", range(10))
    turn_until(service, lambda: state_of(service) == "LIVE")
    with transaction(service.house.database) as connection:
        set_setting(connection, "half", "done")
        made = backup.make(tmp_path / "state", tmp_path / "backup", 1000.0)  # beside an open transaction
    assert "eternad.db" in made.files and "versions/npc/0001/manifest.json" in made.files
    write_drop(tmp_path, "b.jsonl", range(100, 110))
    turn_until(service, lambda: engine.table == {"npc": "npc@0002"})
    make.close()
    (tmp_path / "state" / "eternad.db").write_bytes(b"garbage " * 5000)
    _, before = backup.restore(tmp_path / "backup", tmp_path / "state", 2000.0)
    assert before is not None and (before / "versions" / "npc" / "0002").is_dir()
    engine.restart()
    again = make()
    assert [version.number for version in runs.versions(again.house.database, "npc")] == [1]
    turn_until(again, lambda: engine.table.get("npc") == "npc@0001")
    again.start()
    turn_until(again, lambda: engine.table.get("npc") == "npc@0002")
    assert sum(journal.counts(again.house.database, "npc").values()) == 20
    assert integrity.problems(again.house.database) == [] and audit.broken_at(again.house.database) is None


def test_a_run_at_work_in_the_backup_is_taken_up_again(
    make: Make, engine: MemoryEngine, lab: Path, tmp_path: Path
) -> None:
    """Its trainer is gone with the old machine; its examples are learned all the same."""
    (lab / "orders").write_text("slow")
    service = make()
    service.start()
    write_drop(tmp_path, "a.jsonl", range(10))
    turn_until(service, lambda: state_of(service) == "TRAINING")
    backup.make(tmp_path / "state", tmp_path / "backup", 1000.0)
    service.updates.cancel(runs.active(service.house.database)[0].id)
    make.close()
    shutil.rmtree(tmp_path / "state")
    (lab / "orders").write_text("")
    backup.restore(tmp_path / "backup", tmp_path / "state", 2000.0)
    again = make()
    turn_until(again, lambda: state_of(again) == "LIVE")
    assert engine.table == {"npc": "npc@0001"}


def missing_file(copy: Path) -> None:
    (copy / "versions" / "npc" / "0001" / "adapter_model.safetensors").unlink()


def flipped_bit(copy: Path) -> None:
    data = bytearray((copy / "eternad.db").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "eternad.db").write_bytes(data)


def no_manifest(copy: Path) -> None:
    (copy / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [missing_file, flipped_bit, no_manifest])
def test_a_damaged_backup_changes_nothing(
    eternad: Eternad, state: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Each file's hash is compared before anything is moved; `--verify` says the same."""
    assert "every one was read back" in eternad("backup", str(tmp_path / "copy"))
    assert "is whole" in eternad("restore", str(tmp_path / "copy"), "--verify")
    damage(tmp_path / "copy")
    before = sorted(path.name for path in state.iterdir())
    assert "backup" in eternad("restore", str(tmp_path / "copy"), "--verify", code=1)
    assert "backup" in eternad("restore", str(tmp_path / "copy"), code=1)
    assert sorted(path.name for path in state.iterdir() if path.name != "daemon.lock") == before


def test_backups_are_made_where_nothing_is_overwritten(eternad: Eternad, state: Path, tmp_path: Path) -> None:
    """Not over another backup, and not inside of what is backed up."""
    eternad("backup", str(tmp_path / "copy"))
    assert "is not empty" in eternad("backup", str(tmp_path / "copy"), code=1)
    assert "inside of the state directory" in eternad("backup", str(state / "copy"), code=1)


def test_nothing_is_restored_under_a_running_daemon(eternad: Eternad, state: Path, tmp_path: Path) -> None:
    """The lock's holder is named."""
    eternad("backup", str(tmp_path / "copy"))
    lock = process.acquire(state)
    assert lock is not None
    with lock:
        assert "stop it first" in eternad("restore", str(tmp_path / "copy"), code=1)
    said = eternad("restore", str(tmp_path / "copy"))
    assert "before-restore-" in said
    eternad("doctor")


def test_a_disk_too_small_for_a_restore_changes_nothing(
    state: Path, eternad: Eternad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy arrives beside the state before anything is moved."""
    eternad("backup", str(tmp_path / "copy"))
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space"):
            backup.restore(tmp_path / "copy", state, 0.0)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(CannotRestore, match="no whole backup"):
        backup.restore(tmp_path, state, 0.0)
