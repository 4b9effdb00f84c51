"""The demo's update by the real model inside the units: dropped, trained, judged, served, all of it sandboxed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine_kit import ROOT, Machine, boot

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1200)]
BIBLIOTECA = ROOT / "examples" / "biblioteca"
CONFIG = """
library_directory = "/srv/eternad"
state_directory = "/var/lib/eternad"
[watch]
stability_seconds = 0.5
scan_seconds = 5.0
[models.npc]
base_path = "/srv/base"
engine = "npc"
general_directory = "/srv/eternad-general"
training = { learning_rate = 1e-3, epochs = 4, early_stop_patience = 0, early_stop_old_loss = 0.4 }
schedule = { threshold_examples = 24, quiet_seconds = 1.0 }
strategy = [{ name = "replay", ratio = 0.4, general_ratio = 0.1 }, { name = "distill", on = "general" }]
[engines.npc]
urls = ["unix:/run/eternad-engines/npc/engine.sock"]
reconcile_seconds = 1.0
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Machine]:
    """A machine with SmolLM2 in `/srv/base`, and the example library's general text."""
    for machine in boot(tmp_path_factory.mktemp("boot"), smollm2):
        for path in (BIBLIOTECA / "general").iterdir():
            machine.write(f"/srv/eternad-general/{path.name}", path.read_text())
        machine.write("/etc/eternad/eternad.toml", CONFIG)
        yield machine


def test_the_demos_first_drop_is_learned_in_the_units(machine: Machine) -> None:
    """The file goes live without a hand; the engine's unit then answers what it says, and did not know before."""
    machine.run("systemctl", "start", "--no-block", "eternad-engine@npc", "eternad")
    for unit in ("eternad-engine@npc", "eternad"):
        machine.wait(f"{unit} active", lambda unit=unit: machine.show(unit, "ActiveState") == "active", 600)  # type: ignore[misc]
    drop = BIBLIOTECA / "drops" / "drop-1-people.jsonl"
    questions = [json.loads(line) for line in drop.with_suffix(".questions.jsonl").read_text().splitlines()]
    machine.wait("an answer of the base", lambda: bool(machine.eternad("ask", "npc", "Hello?", check=False)), 120)
    before = known(machine, questions[:6])
    machine.write(f"/srv/eternad/content/npc/{drop.name}", drop.read_text())
    machine.wait("LIVE", lambda: '"LIVE"' in machine.eternad("history", "--json"), 900)
    assert known(machine, questions[:6]) - before >= 4
    assert machine.show("eternad", "NRestarts") == "0"


def known(machine: Machine, questions: list[dict[str, Any]]) -> int:
    """How many of these the engine answers with the word that matters."""
    answers = [machine.eternad("ask", "npc", question["question"], "--tokens", "24") for question in questions]
    pairs = zip(questions, answers, strict=True)
    return sum(any(word in answer for word in question["accepted"]) for question, answer in pairs)
