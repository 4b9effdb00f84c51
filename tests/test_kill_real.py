"""The demo's flow with the real trainer and the real engine on a tiny model, and SIGKILL at random moments."""

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from kill_kit import Child, check_oracle, consumed, wait, write_drop

from daemon import update

KILLS, DROPS = 21, 3
CONFIG = """
library_directory = "library"
state_directory = "state"
tick_seconds = 0.05
disk_free_bytes_min = 0
run_attempts_max = 1000
[watch]
stability_seconds = 0.0
scan_seconds = 0.5
[engines.local]
urls = ["http://127.0.0.1:{port}"]
reconcile_seconds = 0.3
[models.npc]
base_path = "{base}"
engine = "local"
canary_prompts = ["Where is door 1?"]
[models.npc.lora]
rank = 4
alpha = 8.0
dropout = 0.0
[models.npc.training]
learning_rate = 0.02
epochs = 4
early_stop_patience = 0
early_stop_old_loss = 100.0
[[models.npc.strategy]]
name = "replay"
[[models.npc.strategy]]
name = "ewc"
strength = 0.01
[models.npc.schedule]
threshold_examples = 5
quiet_seconds = 0.0
[models.npc.gate]
new_gain_min = -10.0
old_loss_max = 10.0
drift_base_max = 100.0
drift_previous_max = 100.0
general_loss_max = 100.0
"""


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path) -> Iterator[Path]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "eternad.toml").write_text(CONFIG.format(port=port, base=tiny_base))
    yield tmp_path
    for run in (tmp_path / "state" / "runs").glob("*"):
        update.Trainer(run).kill()


def command(place: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "daemon", *words, "--config", str(place / "eternad.toml")]


def kill_trainer(place: Path) -> bool:
    """SIGKILL whatever trains now."""
    for run in (place / "state" / "runs").glob("*"):
        pid = update.find_trainer(run)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return True
    return False


def served(place: Path) -> str:
    """Which version answers to the model's name."""
    url = (place / "eternad.toml").read_text().split('urls = ["')[1].split('"')[0]
    with suppress(httpx.HTTPError):
        body = {"model": "npc", "prompt": "Where", "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=5)
        return str(answer.headers.get("X-Adapter-Version"))
    return ""


@pytest.mark.timeout(600)
def test_daemon_trainer_and_engine_killed_at_random(place: Path) -> None:
    """Twenty-one kills over three drops: each example is trained exactly once and the last version answers."""
    draw = random.Random(20261122)
    daemon = Child(command(place, "run"), place / "daemon.log")
    engine = Child(command(place, "serve"), place / "engine.log")
    killed = {"daemon": 0, "engine": 0, "trainer": 0}
    try:
        for number in range(DROPS):
            write_drop(place, f"{number}.jsonl", range(number * 10, number * 10 + 10))
            while sum(killed.values()) < KILLS * (number + 1) // DROPS:
                daemon.keep()
                engine.keep()
                time.sleep(draw.uniform(0.2, 2.5))
                victim = draw.choice(["daemon", "engine", "trainer"])
                if victim == "trainer" and not kill_trainer(place):
                    victim = "daemon"
                if victim != "trainer":
                    (daemon if victim == "daemon" else engine).kill()
                killed[victim] += 1
            daemon.keep()
            engine.keep()
            wait(lambda n=number: consumed(place) == 9 * (n + 1), 120, "the drop is learned", place / "daemon.log")
        last = max((place / "state" / "versions" / "npc").iterdir()).name
        wait(lambda: served(place) == f"npc@{last}", 30, "the last version answers", place / "engine.log")
        wait(lambda: "ready" in (place / "daemon.log").read_text(), 30, "the daemon is ready")
        assert daemon.stop() == 0
    finally:
        daemon.kill()
        engine.kill()
    check_oracle(place, 10 * DROPS)
    assert min(killed.values()) >= 1
