"""Runs as TensorBoard event files, read back record by record."""

import builtins
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from operator_kit import config_fixture, eternad_fixture, state_fixture
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

__all__ = ["config_fixture", "eternad_fixture", "state_fixture"]


def read(directory: Path) -> list[Event]:
    """All events of a directory: records of length, checksum, protobuf, checksum (TFRecord)."""
    found = []
    for path in sorted(directory.glob("events.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            body = data[12 : 12 + length]
            assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(body)
            found.append(Event.FromString(body))
            data = data[16 + length :]
    return found


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in read(directory):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_losses_by_step_and_the_path_by_update(eternad: Callable[..., str], state: Path, tmp_path: Path) -> None:
    """A directory per run with its training losses; one per model with hold-outs, drift and cost of each update."""
    assert "3 runs written" in eternad("tensorboard", str(tmp_path / "board"))
    assert scalars(tmp_path / "board" / "npc-00001")["train/loss"] == [(1, 3.0), (5, 2.0), (10, 1.0)]
    path: Mapping[str, Any] = scalars(tmp_path / "board" / "npc")
    assert path["loss_after/new"] == [(1, 1.0), (2, pytest.approx(0.8)), (3, 4.0)]
    assert path["drift/base"][0] == (1, pytest.approx(0.3))
    assert path["cost/tokens_per_second"][0] == (1, 400.0)
    texts = [value.tensor.string_val[0].decode() for event in read(tmp_path / "board" / "npc-00003")
             for value in event.summary.value if value.HasField("tensor")]  # fmt: skip
    assert texts[0].startswith("**REJECTED** ") and "Who are you?" in texts[0]


def test_what_is_there_is_not_written_again(eternad: Callable[..., str], state: Path, tmp_path: Path) -> None:
    """The command can be repeated; a run at work is not exported, a half-written one is done again."""
    board = tmp_path / "board"
    eternad("tensorboard", str(board), "npc")
    assert not (board / "npc-00004").exists()
    (board / "npc-00002").rename(board / ".npc-00002")
    assert "1 runs written" in eternad("tensorboard", str(board), "npc")
    assert "0 runs written" in eternad("tensorboard", str(board))


def test_without_the_library_it_says_what_to_install(
    eternad: Callable[..., str], state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One sentence; everything else works without it."""
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("daemon.tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboardX'", name="tensorboardX")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'eternad[tensorboard]'" in eternad("tensorboard", str(tmp_path / "board"), code=1)
