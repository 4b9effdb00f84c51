"""The commands around the daemon: init, serve, ask, units, completion."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from operator_kit import config_fixture, eternad_fixture, state_fixture

from daemon import cli
from daemon.cli import foreground
from daemon.cli.failure import BAD_CONFIG, FAILED, USAGE
from daemon.config import load
from daemon.machine import units

Eternad = Any
fixtures = (config_fixture, state_fixture, eternad_fixture)


def test_init_writes_a_configuration_that_checks(eternad: Eternad, tmp_path: Path) -> None:
    """Ready to use once the base model is there; never over a file that exists."""
    text = eternad("init", "new.toml", "--model", "director")
    assert "eternad check-config --config new.toml" in text
    loaded = load(tmp_path / "new.toml")
    assert list(loaded.models) == ["director"]
    assert [type(each).__name__ for each in loaded.models["director"].strategy] == ["Replay", "Distill"]
    assert "director (replay+distill on local)" in eternad("check-config", "-c", "new.toml")
    assert json.loads(eternad("check-config", "-c", "new.toml", "--json"))["state_directory"] == str(tmp_path / "state")
    assert "exists: give another path" in eternad("init", "new.toml", code=FAILED)
    assert "must match" in eternad("init", "newer.toml", "--model", "A b", code=USAGE)


@pytest.mark.parametrize(("width", "pace"), [(8, (9e-4, 4, 4)), (30_000, (1e-4, 3, 8)), (None, (9e-4, 4, 4))])
def test_the_first_configuration_is_gentler_to_large_models(
    eternad: Eternad, tmp_path: Path, width: int | None, pace: tuple[float, int, int]
) -> None:
    """By the header of the weights, which need not be read; files that are none are no reason to fail."""
    (tmp_path / "own").mkdir()
    header = json.dumps(
        {"__metadata__": {}, "a": {"shape": [width, width]}, "b": {"shape": [2, width, width]}}
    ).encode()
    body = len(header).to_bytes(8, "little") + header if width else b"version https://git-lfs"
    (tmp_path / "own" / "model.safetensors").write_bytes(body)
    eternad("init", "sized.toml", "--base", "own")
    (tmp_path / "own" / "config.json").write_text("{}")
    training = load(tmp_path / "sized.toml").models["npc"].training
    assert (training.learning_rate, training.epochs, training.batch_examples) == pace


def test_serve_starts_an_engine_as_the_configuration_says(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, rank and slots by the models that use it; host and port by its url."""
    called: list[list[str]] = []
    monkeypatch.setattr(foreground.os, "execv", lambda _path, arguments: called.append(arguments))
    assert cli.main(["serve"]) == 0
    arguments = called[0]
    assert arguments[1:3] == ["-m", "serving"]
    options = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    state = config.parent / "state"
    assert options == {
        "--base": str(config.parent / "base"), "--adapter-root": str(state / "versions"), "--host": "127.0.0.1",
        "--port": "9", "--alias-file": str(state / "engines" / "local.json"), "--max-rank": "16", "--slots": "6",
        "--threads": "1",
    }  # fmt: skip
    assert (state / "versions").is_dir()


def test_serve_refuses_what_one_engine_cannot_serve(eternad: Eternad, config: Path) -> None:
    """Two bases, no urls, an unknown name."""
    assert "there are: local" in eternad("serve", "lcal", code=USAGE)
    text = config.read_text()
    config.write_text(text.replace('urls = ["http://127.0.0.1:9"]', ""))
    assert "has no urls" in eternad("serve", code=BAD_CONFIG)
    (config.parent / "other").mkdir()
    (config.parent / "other" / "config.json").write_text("{}")
    config.write_text(text.replace('base_path = "base"', 'base_path = "other"', 1))
    assert "needs models of one base, but has 2" in eternad("serve", code=BAD_CONFIG)


def test_an_engine_at_a_unix_socket_is_served_there(config: Path) -> None:
    """`unix:` urls become `--uds`."""
    config.write_text(config.read_text().replace("http://127.0.0.1:9", "unix:/run/eternad/engine.sock"))
    arguments = foreground.arguments_of(load(config), "local")
    assert arguments[arguments.index("--uds") + 1] == "/run/eternad/engine.sock"


class Replica(BaseHTTPRequestHandler):
    """An engine that repeats what it was asked."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] == "npc@0009":
            return self._send(404, b'{"error": {"message": "no model npc@0009"}}')
        answer = f"{body['messages'][0]['content']}\x1b[31m!"
        if not body["stream"]:
            return self._send(200, json.dumps({"choices": [{"message": {"content": answer}}]}).encode())
        events = [{"choices": [{"delta": {"content": piece}}]} for piece in (answer[:3], answer[3:])]
        lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
        self._send(200, b"".join(lines) + b"data: [DONE]\n\n")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("X-Adapter-Version", "npc@0002")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def engine(config: Path) -> Any:
    """An engine at the configuration's url."""
    server = HTTPServer(("127.0.0.1", 0), Replica)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    config.write_text(config.read_text().replace("127.0.0.1:9", f"127.0.0.1:{server.server_port}"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_ask_prints_the_answer_and_who_gave_it(
    config: Path, engine: HTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole or streamed; the version on stderr, so that a pipe gets the answer alone; control characters are shown."""
    for extra in ([], ["--stream"]):
        assert cli.main(["ask", "npc", "Who?\nYou!", *extra]) == 0
        said = capsys.readouterr()
        assert said.out == "Who?\nYou!\\x1b[31m!\n"
        assert said.err == "answered by npc@0002\n"


def test_ask_for_scripts_and_of_versions(eternad: Eternad, engine: HTTPServer) -> None:
    """`--json`, and a version that the engine does not have."""
    assert json.loads(eternad("ask", "npc", "Hm", "--json"))["version"] == "npc@0002"
    assert "the engine answered 404: no model npc@0009" in eternad("ask", "npc", "Hm", "--version", "9", code=FAILED)


def test_ask_without_an_engine_says_how_to_start_one(eternad: Eternad) -> None:
    """One sentence."""
    assert "does not answer (" in eternad("ask", "npc", "Hm", code=FAILED)


def test_units_are_installed_and_removed(eternad: Eternad, tmp_path: Path) -> None:
    """The commands print each file, and what to run next."""
    root = str(tmp_path / "root")
    text = eternad("install-units", "--root", root, "--prefix", "/opt/eternad")
    assert f"create {root}/usr/local/lib/systemd/system/eternad.service" in text
    assert units.NEXT_STEPS[0] in text
    assert "remove" in eternad("uninstall-units", "--root", root)
    assert "no drop-in" in eternad("install-units", "--root", root, "--prefix", "/opt/e", "--drop-in", "x", code=FAILED)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(eternad: Eternad, shell: str) -> None:
    """A script that asks this command."""
    assert "_ETERNAD_COMPLETE=complete_" + shell in eternad("completion", shell)


def test_the_shell_completes_commands_and_models(config: Path) -> None:
    """What bash gets when it asks the way the script does."""
    for words, index, expected in (("eternad upd", "1", "update"), ("eternad update n", "2", "npc")):
        environment = {
            **os.environ, "COMP_WORDS": words, "COMP_CWORD": index, "_ETERNAD_COMPLETE": "complete_bash",
            "PYTHONPATH": str(Path(cli.__file__).parents[2]),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from daemon.cli import main; sys.exit(main())"],
            env=environment, cwd=config.parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.split() == [expected], done
