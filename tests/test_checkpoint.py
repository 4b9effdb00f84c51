"""Checkpoints that are whole or do not count; states of the methods between updates."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strategies.base_hash import CACHE_FILE, base_sha256
from strategies.checkpoint import (
    load_optimizer,
    load_states,
    random_states,
    read_checkpoint,
    remove_checkpoint,
    restore_random_states,
    save_optimizer,
    save_states,
    write_checkpoint,
)
from strategies.failure import Failure
from strategies.learner import JsonNotes, Learner

DATA = "ab" * 32


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    """Tensors to the bit, notes as JSON; the one before is dropped."""
    write_checkpoint(tmp_path, 1, {"flat": torch.zeros(3)}, {"step": 1}, DATA)
    write_checkpoint(tmp_path, 2, {"flat": torch.arange(3.0)}, {"step": 2}, DATA)
    found = read_checkpoint(tmp_path, DATA)
    assert found is not None and torch.equal(found[0]["flat"], torch.arange(3.0)) and found[1] == {"step": 2}
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["checkpoint-00000002.safetensors"]
    remove_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == [] and read_checkpoint(tmp_path, DATA) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "other data", "no marker", "torn marker"])
def test_what_does_not_fit_together_is_ignored(tmp_path: Path, damage: str) -> None:
    """A crash in the middle, a bad disk or another experience: there is no checkpoint."""
    write_checkpoint(tmp_path, 7, {"flat": torch.ones(9)}, {}, DATA)
    (file,) = tmp_path.glob("*.safetensors")
    body, marker = file.read_bytes(), tmp_path / "checkpoint.json"
    if damage == "cut":
        file.write_bytes(body[:-1])
    elif damage == "flipped":
        file.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    elif damage == "no marker":
        marker.unlink()
    elif damage == "torn marker":
        marker.write_bytes(marker.read_bytes()[:-5])
    assert read_checkpoint(tmp_path, "cd" * 32 if damage == "other data" else DATA) is None


def test_a_crash_before_the_marker_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker is written last: until then the older file is the checkpoint."""
    write_checkpoint(tmp_path, 1, {"flat": torch.ones(2)}, {"step": 1}, DATA)

    def crash(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("strategies.checkpoint.write", crash)
    with pytest.raises(OSError, match="power cut"):
        write_checkpoint(tmp_path, 2, {"flat": torch.zeros(2)}, {"step": 2}, DATA)
    found = read_checkpoint(tmp_path, DATA)
    assert found is not None and found[1] == {"step": 1}


def test_draws_go_on_where_they_stopped() -> None:
    """Restored generators give the numbers that would have come."""
    kept = {name: state.clone() for name, state in random_states().items()}
    expected = torch.rand(5)
    torch.rand(100)
    restore_random_states(kept)
    assert torch.equal(torch.rand(5), expected)


class Memory(Learner):
    """Remembers one tensor and one number."""

    name = "memory"

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {"mean": torch.full((4,), value)} if value else {}
        self.notes: JsonNotes = {"updates": int(value)} if value else {}

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:
        self.tensors, self.notes = {"mean": tensors["mean"]}, notes

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        return self.tensors, self.notes


def test_a_method_finds_its_state_in_the_next_update(tmp_path: Path) -> None:
    """One safetensors and one JSON file per method; one without anything to remember leaves no file."""
    save_states(tmp_path / "strategy", [Memory(3.0)])
    later = Memory()
    load_states(tmp_path / "strategy", [later])
    assert torch.equal(later.tensors["mean"], torch.full((4,), 3.0)) and later.notes == {"updates": 3}
    save_states(tmp_path / "empty", [Memory()])
    assert list((tmp_path / "empty").iterdir()) == []
    load_states(tmp_path / "empty", [Memory()])


def test_a_damaged_state_is_a_failure_that_names_its_file(tmp_path: Path) -> None:
    """Protection that cannot be read must not silently become no protection."""
    save_states(tmp_path, [Memory(3.0)])
    (tmp_path / "memory.safetensors").write_bytes(b"torn")
    with pytest.raises(Failure, match=r"memory\.safetensors") as caught:
        load_states(tmp_path, [Memory()])
    assert caught.value.code == "strategy_state"


def test_an_optimiser_is_kept_on_demand(tmp_path: Path) -> None:
    """Moments come back; a version that kept none gives none."""
    assert load_optimizer(tmp_path) == {}
    save_optimizer(tmp_path, {"exp_avg": torch.ones(3)})
    assert torch.equal(load_optimizer(tmp_path)["exp_avg"], torch.ones(3))


def test_the_base_hash_changes_with_any_part_and_is_cached(tmp_path: Path) -> None:
    """Weights, configuration and tokenizer count; a hash is not computed twice for the same file."""
    base, cache = tmp_path / "base", tmp_path / "cache"
    base.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (base / name).write_text(name)
    first = base_sha256(base, cache)
    assert first == base_sha256(base) == base_sha256(base, cache)
    assert len(json.loads((cache / CACHE_FILE).read_bytes())) == 3
    (base / "tokenizer.json").write_text("another")
    assert base_sha256(base, cache) != first
    (cache / CACHE_FILE).write_text("torn")
    assert base_sha256(base, cache) == base_sha256(base)
