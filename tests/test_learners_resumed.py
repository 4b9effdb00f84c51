"""A whole run with many methods at once, interrupted and resumed, ends as an uninterrupted one does."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buffers.example import Example
from buffers.experience import Role, Row
from strategies import catalog, pulse, train
from strategies.request import EXIT_INTERRUPTED, EXIT_TRAINED, Lora, RunRequest, Training, read_report, write

METHODS: dict[str, list[catalog.Strategy]] = {
    "penalties": [
        catalog.Replay(),
        catalog.SynapticIntelligence(strength=0.1),
        catalog.Ewc(strength=0.1, samples=3, general=0.5),
        catalog.MemoryAwareSynapses(strength=0.1, samples=3),
        catalog.Kronecker(strength=0.1, samples=3),
    ],
    "projections": [
        catalog.Augment(noise=1.0),
        catalog.Distill(teacher="previous"),
        catalog.DerPlusPlus(top=5),
        catalog.Gem(refresh_steps=3, strength=0.01),
        catalog.AGem(examples=3),
    ],
    "slices": [catalog.OLora(slice_rank=2), catalog.Freeze(share=0.5)],
}


def rows(role: Role, update: int, count: int) -> list[Row]:
    """Short texts that only this update has."""
    texts = [f"{update}: door {place} leads to hall {place * update % 7}." for place in range(count)]
    return [
        Row(role=role, update=update, id=place, example=Example(shape="text", completion=text))
        for place, text in enumerate(texts)
    ]


def make_run(directory: Path, base: Path, update: int, strategies: list[catalog.Strategy], **changes: Any) -> Path:
    """A run directory with new, replayed, remembered and general rows."""
    directory.mkdir(parents=True)
    kept = [*rows("new", update, 8), *rows("general", 0, 2)]
    kept += [row for past in range(1, update) for row in [*rows("replay", past, 3), *rows("memory", past, 3)]]
    body = b"".join(msgspec.json.encode(row) + b"\n" for row in kept)
    (directory / "experience.jsonl").write_bytes(body)
    training = Training(learning_rate=5e-3, epochs=2, batch_examples=4, early_stop_patience=0, early_stop_old_loss=9.0)
    request = RunRequest(
        run_id=directory.name, model="npc", update_number=update, base_path=base, training=training,
        experience_sha256=hashlib.sha256(body).hexdigest(), lora=Lora(rank=4, dropout=0.1), strategies=strategies,
        **changes,
    )  # fmt: skip
    write(directory / "request.json", request)
    return directory


def states(directory: Path) -> dict[str, bytes]:
    """Every file of the adapter and of the methods' states."""
    files = [path for part in ("adapter", "strategy") for path in sorted((directory / part).glob("*"))]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("methods", METHODS)
def test_an_interrupted_second_update_resumes_bit_for_bit(
    methods: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop at step 2 of a second update, the run goes on as if nothing had happened, counts included."""
    parent = make_run(tmp_path / "1", tiny_base, 1, METHODS[methods])
    assert train.main(parent) == EXIT_TRAINED, read_report(parent)
    version = tmp_path / "version"
    shutil.copytree(parent / "adapter", version)
    shutil.copytree(parent / "strategy", version / "strategy")
    whole = make_run(tmp_path / "2", tiny_base, 2, METHODS[methods], parent_version=version)
    stopped = make_run(tmp_path / "interrupted" / "2", tiny_base, 2, METHODS[methods], parent_version=version)
    assert train.main(whole) == EXIT_TRAINED, read_report(whole)
    original = pulse.Pulse.step

    def stop_at_two(self: pulse.Pulse, done: int, *rest: Any) -> None:
        self.is_told_to_stop = done == 2
        original(self, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pulse.Pulse, "step", stop_at_two)
        assert train.main(stopped) == EXIT_INTERRUPTED
    assert train.main(stopped) == EXIT_TRAINED
    assert states(stopped) == states(whole)
    report, expected = read_report(stopped), read_report(whole)
    assert report is not None
    assert expected is not None
    assert report.strategies == expected.strategies
    assert set(report.strategies) == {type(method).__struct_config__.tag for method in METHODS[methods]}
    assert report.losses == expected.losses
