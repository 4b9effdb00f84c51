"""Versions are whole, immutable and checkable."""

from pathlib import Path

import pytest

from daemon import publish
from daemon.publish import DamagedVersion, Manifest


def manifest(run_id: str = "npc-00001") -> Manifest:
    return Manifest(
        model="npc", number=1, parent=None, run_id=run_id, update_number=1, experience_sha256="e", base_sha256="b",
        libraries={}, created_at=0.0, files={},
    )  # fmt: skip


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    (directory / "adapter").mkdir(parents=True)
    (directory / "strategy").mkdir()
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (directory / "adapter" / "adapter_config.json").write_text("{}")
    (directory / "strategy" / "ewc.safetensors").write_bytes(b"fisher")
    return directory


def test_a_version_holds_adapter_and_strategy_and_verifies(run_directory: Path, tmp_path: Path) -> None:
    """Every file is named in the manifest by its hash, and what the strategy knows travels with the version."""
    version = tmp_path / "versions" / "npc" / "0001"
    publish.publish(run_directory, version, manifest())
    assert set(publish.verify(version).files) == {
        "adapter_model.safetensors", "adapter_config.json", "strategy/ewc.safetensors",
    }  # fmt: skip


def test_publishing_again_after_a_crash_gives_the_same_version(run_directory: Path, tmp_path: Path) -> None:
    """The manifest's hash is the same, so the row that names it fits whichever attempt came through."""
    version = tmp_path / "npc" / "0001"
    first = publish.publish(run_directory, version, manifest())
    assert publish.publish(run_directory, version, manifest()) == first


def test_what_another_run_left_under_the_number_is_replaced(run_directory: Path, tmp_path: Path) -> None:
    """A daemon that died between the rename and its transaction leaves a version that nobody knows."""
    version = tmp_path / "npc" / "0001"
    publish.publish(run_directory, version, manifest("npc-00001"))
    publish.publish(run_directory, version, manifest("npc-00002"))
    found = publish.read_manifest(version)
    assert found is not None
    assert found.run_id == "npc-00002"


def test_a_half_written_version_is_never_visible(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When writing breaks off, nothing lies under the version's name, and the next attempt clears up."""
    version = tmp_path / "npc" / "0001"
    write = publish._write_durably

    def break_at_the_manifest(path: Path, data: bytes) -> None:
        if path.name == "manifest.json":
            raise OSError("No space left on device")
        write(path, data)

    monkeypatch.setattr(publish, "_write_durably", break_at_the_manifest)
    with pytest.raises(OSError, match="No space"):
        publish.publish(run_directory, version, manifest())
    assert not version.exists()
    assert publish.unfinished(tmp_path) == [tmp_path / "npc" / ".0001.tmp"]
    monkeypatch.undo()
    publish.publish(run_directory, version, manifest())
    assert publish.unfinished(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_named(run_directory: Path, tmp_path: Path, damage: str) -> None:
    """safetensors has no checksum: one flipped bit must be found by ours."""
    version = tmp_path / "npc" / "0001"
    publish.publish(run_directory, version, manifest())
    weights = version / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    weights.unlink()
    if damage == "flip":
        data[3000] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-1])
    with pytest.raises(DamagedVersion, match="adapter_model"):
        publish.verify(version)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "weights.pt", "code.py", "manifest.json", ".hidden.json", "a\nb.json"]
)
def test_what_no_version_may_hold_is_not_published(run_directory: Path, tmp_path: Path, name: str) -> None:
    """Only plain files *.safetensors and *.json; the error names the other, and no version appears."""
    (run_directory / "adapter" / name).write_bytes(b"\x80\x04")
    with pytest.raises(publish.UnexpectedFile, match="is not published"):
        publish.publish(run_directory, tmp_path / "npc" / "0001", manifest())
    assert not (tmp_path / "npc" / "0001").exists()


def test_a_link_or_a_directory_is_not_published(run_directory: Path, tmp_path: Path) -> None:
    """What a link points to may change, or be none of ours."""
    link, directory = run_directory / "adapter" / "x.json", run_directory / "strategy" / "x.json"
    link.symlink_to("/etc/hostname")
    with pytest.raises(publish.UnexpectedFile):
        publish.publish(run_directory, tmp_path / "npc" / "0001", manifest())
    link.unlink()
    directory.mkdir()
    with pytest.raises(publish.UnexpectedFile):
        publish.publish(run_directory, tmp_path / "npc" / "0001", manifest())
