"""The resident daemon as a process: small, free of torch, and undisturbed by everything bad that is dropped."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kill_kit import consumed, scripted, wait, write_drop
from service_kit import prepare_lab
from test_kill import CONFIG, start_for_good

RSS_BYTES_MAX = 80 * 1024 * 1024


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A daemon that runs for all tests of this module, with a scripted trainer and an engine in memory."""
    directory = tmp_path_factory.mktemp("resident")
    (directory / "base").mkdir()
    (directory / "base" / "config.json").write_text("{}")
    (directory / "eternad.toml").write_text(CONFIG)
    prepare_lab(directory / "lab")
    daemon = scripted(directory)
    start_for_good(daemon, directory)
    yield directory
    assert daemon.stop() == 0


def eternad(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "daemon", *words, "--config", str(place / "eternad.toml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def refused(place: Path) -> list[dict[str, Any]]:
    answer = json.loads(eternad(place, "quarantine", "ls", "--json").stdout)
    return list(answer["quarantine"] if isinstance(answer, dict) else answer)


def daemon_pid(place: Path) -> int:
    return int((place / "state" / "daemon.lock").read_text())


def test_the_daemon_is_small_and_has_no_torch(place: Path) -> None:
    """After an update it holds less than 80 MiB, and no library of torch is mapped into it."""
    write_drop(place, "first.jsonl", range(10))
    wait(lambda: consumed(place) >= 9, 30, "the update is live", place / "daemon.log")
    process = Path(f"/proc/{daemon_pid(place)}")
    resident = int(process.joinpath("statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert "libtorch" not in process.joinpath("maps").read_text()
    assert resident <= RSS_BYTES_MAX


def test_a_second_daemon_is_refused_and_names_the_first(place: Path) -> None:
    """Exit 75, and the pid of the holder."""
    second = eternad(place, "run")
    assert second.returncode == 75
    assert str(daemon_pid(place)) in second.stderr


def drop_bad_files(library: Path) -> None:
    npc = library / "content" / "npc"
    (npc / "picture.md").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)
    (npc / "latin1.txt").write_bytes("una página más, señor bibliotecario".encode("latin-1"))
    with (npc / "huge.txt").open("wb") as file:
        file.truncate(2 * 1024**3)
    (library / "content" / "nobody").mkdir()
    (library / "content" / "nobody" / "a.txt").write_text("A text for a model that does not exist.\n")
    feedback = library / "feedback" / "npc" / "game"
    feedback.mkdir(parents=True)
    (feedback / "torn.jsonl").write_text('{"schema": "eternad.feedback/1", "id": "01')
    record = {
        "schema": "eternad.feedback/1", "id": "01940000-0000-7000-8000-000000000001", "ts": "2026-11-22T10:00:00Z",
        "kind": "boolean", "model": "poet", "subject": {"id": "h:player-0001"},
        "source": {"app": "game", "channel": "chat", "reporter": "player"},
        "input": {"messages": [{"role": "user", "content": "hi"}]}, "metric": "liked", "value": True,
        "output": {"messages": [{"role": "assistant", "content": "ho"}]},
    }  # fmt: skip
    (feedback / "other.jsonl").write_text(json.dumps(record) + "\n")


def test_bad_files_get_one_clear_message_each_and_the_daemon_goes_on(place: Path) -> None:
    """What, where and what to do; a torn last line only waits; a good file dropped afterwards is learned."""
    drop_bad_files(place / "library")
    wait(lambda: len(refused(place)) >= 5, 60, "five refusals", place / "daemon.log")
    messages = {Path(row["path"]).name: row["message"] for row in refused(place)}
    assert set(messages) == {"picture.md", "latin1.txt", "huge.txt", "a.txt", "other.jsonl"}
    assert "npc" in messages["a.txt"]  # the models that there are
    assert "byte" in messages["latin1.txt"]
    assert "poet" in messages["other.jsonl"]
    assert all(len(message) > 30 for message in messages.values())
    before = consumed(place)
    write_drop(place, "after.jsonl", range(100, 110))
    wait(lambda: consumed(place) > before, 30, "the good file is learned", place / "daemon.log")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("base_path = \"base\"", 'base_path = "nowhere"'), "nowhere"),
        (("threshold_examples", "treshold_examples"), "threshold_examples"),
        (('engine = "local"', 'engine = "lokal"'), "local"),
        (("tick_seconds = 0.02", "tick_seconds = 0.02 seconds"), "line"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_used_is_one_sentence(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    """Exit 78, what is wrong and the nearest right thing, no traceback."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "eternad.toml").write_text(CONFIG.replace(*change))
    for command in ("check-config", "run"):
        answer = eternad(tmp_path, command)
        assert answer.returncode == 78
        assert said in answer.stderr + answer.stdout
        assert "Traceback" not in answer.stderr
