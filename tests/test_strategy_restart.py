"""What EWC and GEM know survives a restart of the daemon between two updates."""

from pathlib import Path

import pytest
from service_kit import MemoryEngine, drop, make_config, turn_until

from daemon.config import Gate, Schedule
from daemon.service import Service, serving
from daemon.state import runs
from strategies.catalog import Ewc, Gem
from strategies.request import Lora, RunReport, Training, read_report

LENIENT = Gate(
    new_gain_min=-100.0, old_loss_max=100.0, drift_base_max=1000.0, drift_previous_max=1000.0, general_loss_max=1000.0
)


def open_service(directory: Path, base: Path) -> Service:
    config = make_config(
        directory, base_path=base, gate=LENIENT, strategy=[Ewc(strength=0.1, samples=8), Gem()],
        lora=Lora(rank=4, alpha=8.0, dropout=0.1), schedule=Schedule(threshold_examples=5, quiet_seconds=0.0),
        training=Training(learning_rate=2e-2, epochs=2, batch_examples=4, early_stop_patience=0,
                          early_stop_old_loss=100.0),
        canary_prompts=["q1"],
    )  # fmt: skip
    return Service(config, directory / "eternad.toml")


def learn(service: Service, answer: str, version: int) -> None:
    """The same questions with other answers each time: the gradients of two updates contradict each other."""
    drop(service, range(12), answer=answer)
    turn_until(service, lambda: len(runs.recent(service.house.database, "npc")) == version)
    turn_until(service, lambda: runs.recent(service.house.database, "npc", 1)[0].state == "LIVE", seconds=120)


def two_updates(directory: Path, base: Path, *, restart: bool) -> tuple[bytes, RunReport]:
    """The second version's weights, and what its run reported."""
    directory.mkdir()
    service = open_service(directory, base)
    learn(service, "a", 1)
    if restart:
        service.close()
        service = open_service(directory, base)
    learn(service, "b", 2)
    weights = (service.serving.directory("npc", 2) / "adapter_model.safetensors").read_bytes()
    report = read_report(directory / "state" / "runs" / "npc-00002")
    service.close()
    assert report is not None
    return weights, report


@pytest.mark.timeout(600)
def test_a_restart_between_two_updates_changes_nothing(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EWC's penalty and GEM's constraints act in update 2, and its weights are those of a run without the restart."""
    monkeypatch.setattr(serving, "build", lambda *_: MemoryEngine())
    with_restart, report = two_updates(tmp_path / "a", tiny_base, restart=True)
    without, other = two_updates(tmp_path / "b", tiny_base, restart=False)
    assert with_restart == without
    assert report.strategies == other.strategies
    assert report.strategies["ewc"]["penalty"] > 0
    assert report.strategies["gem"]["constraints"] == 1
    assert report.strategies["gem"]["projections"] > 0
