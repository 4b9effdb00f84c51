"""The command line: what it says, its exit codes, what it needs a daemon for, and that it starts at once."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from operator_kit import answering, make_config, make_state, progress

from buffers import journal
from daemon import cli, units
from daemon.cli import context, foreground, glance, screen
from daemon.cli.failure import BAD_CONFIG, FAILED, NOT_RUNNING, USAGE
from daemon.config import load
from daemon.control import Command
from daemon.state import runs
from daemon.state.database import open_database, transaction
from strategies.request import write

Eternad = Any


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that is found by itself, because commands run in its directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ETERNAD_CONFIG", raising=False)
    return make_config(tmp_path)


@pytest.fixture
def state(config: Path) -> Path:
    """A state directory with a past."""
    return make_state(config.parent)


@pytest.fixture
def eternad(config: Path, capsys: pytest.CaptureFixture[str]) -> Eternad:
    """Runs a command and gives its output; fails unless the exit code is the expected one."""

    def call(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        returned = cli.main(arguments)
        said = capsys.readouterr()
        assert returned == code, said
        assert "Traceback" not in said.err
        return said.out if code == 0 else said.err

    return call


def test_the_command_never_imports_torch_and_status_not_even_typer(config: Path) -> None:
    """`status` is called by people and scripts all day: it imports what it needs and nothing else."""
    code = (
        "import sys; from daemon.cli import main; assert main(['status', '--json']) == 0;"
        "bad = {'torch', 'transformers', 'avalanche', 'peft', 'typer', 'rich', 'starlette'} & set(sys.modules);"
        "assert not bad, bad; assert main(['history']) == 0;"
        "bad = {'torch', 'transformers', 'avalanche', 'peft', 'starlette', 'uvicorn'} & set(sys.modules);"
        "assert not bad, bad"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=config.parent, env=environment, check=True, capture_output=True)


def test_before_the_first_start_everything_says_so(eternad: Eternad) -> None:
    """No state yet is no error."""
    assert "eternad is not running" in eternad("status")
    assert eternad("history") == "no run yet\n"
    assert "base models are served" in eternad("versions")
    assert eternad("quarantine", "ls") == "nothing is quarantined\n"
    assert eternad("log") == ""
    assert "nothing was learned yet" in eternad("buffer", "show", "npc")


def test_status_shows_the_pipeline_while_the_daemon_is_down(eternad: Eternad, state: Path) -> None:
    """Version, what waits and for what, the run with its progress, the last verdict, the quarantine."""
    text = eternad("status")
    assert "npc  version 2" in text
    assert "3 of 32 examples; at the latest in" in text
    assert "npc-00004 TRAINING [" not in text
    assert re.search(r"npc-00004 TRAINING #########-{11} 45% step 45/100 loss 1\.250 312 tokens/s 12 s left", text)
    assert "npc-00003 REJECTED" in text
    assert "quarantine: 1 not_utf8" in text
    assert "engine local: not asked" in text


def test_status_asks_the_running_daemon(eternad: Eternad, state: Path) -> None:
    """What only the daemon knows comes through its socket."""
    with answering(state):
        text = eternad("status")
        found = json.loads(eternad("status", "--json"))
    assert "eternad is running (pid 4711, up 60 s)" in text
    assert "engine local: ok, serves 2" in text
    assert found["running"] and found["models"][1]["engine_serves"] == 2


def test_status_is_one_document_for_scripts(eternad: Eternad, state: Path) -> None:
    """`--json` has everything, also through the longer way of typer."""
    quick = json.loads(eternad("status", "--json"))
    long = json.loads(eternad("-c", "eternad.toml", "status", "--json"))
    assert [model["name"] for model in quick["models"]] == ["book", "npc"]
    assert quick["models"] == long["models"]
    npc = quick["models"][1]
    assert npc["live_version"] == 2 and npc["run"]["progress"]["step"] == 45 and npc["quarantined"] == 1


def test_a_paused_model_is_shown_with_the_way_back(eternad: Eternad, state: Path) -> None:
    """Nobody should wonder why nothing happens."""
    connection = open_database(state / "eternad.db")
    connection.execute("INSERT INTO setting VALUES ('paused/npc', '1')")
    connection.close()
    assert "paused; 3 examples wait (eternad resume npc)" in eternad("status")


def test_watching_a_pipe_prints_the_status_again_and_again(
    config: Path, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`status --watch` ends with Ctrl-C, exit code 130."""
    turns = iter([None, None])

    def sleep(_seconds: float) -> None:
        if next(turns, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr(glance.time, "sleep", sleep)
    assert cli.main(["status", "--watch"]) == 130
    assert capsys.readouterr().out.count("npc  version 2") == 3


def test_history_lists_runs_newest_first(eternad: Eternad, state: Path) -> None:
    """Of one model or all, as a table or as JSON."""
    lines = eternad("history", "npc").splitlines()
    assert lines[0].split()[:3] == ["RUN", "STATE", "VERSION"]
    assert [line.split()[0] for line in lines[1:]] == ["npc-00004", "npc-00003", "npc-00002", "npc-00001"]
    assert len(json.loads(eternad("history", "--json", "-n", "2"))) == 2
    assert eternad("history", "book") == "no run yet\n"


def test_versions_show_their_parents(eternad: Eternad, state: Path) -> None:
    """The lineage of what was served."""
    lines = eternad("versions", "npc").splitlines()
    assert lines[1].split()[:5] == ["npc", "2", "live", "1", "npc-00002"]
    assert lines[2].split()[:5] == ["npc", "1", "superseded", "base", "npc-00001"]
    assert json.loads(eternad("versions", "--json"))[0]["number"] == 2


def test_show_explains_a_verdict_by_its_numbers(eternad: Eternad, state: Path) -> None:
    """Losses before and after with intervals, each check with its limit, what each strategy did."""
    text = eternad("show", "npc-00003")
    assert "run npc-00003 of npc: REJECTED" in text
    assert "verdict: rejected" in text
    assert "failed  new_gain: loss on the new hold-out 2.500 -> 4.000" in text
    assert re.search(r"new +10 +3\.000 +2\.500 +4\.000 +\+1\.500 \[\+1\.400, \+1\.600\]", text)
    assert re.search(r"update 1 +10", text)
    assert "replay: replayed 4" in text
    assert "10 steps, 2.0 epochs, 5000 tokens, 400 tokens/s, peak memory 1.0 GiB" in text
    assert json.loads(eternad("show", "npc-00003", "--json"))["report"]["steps"] == 10


def test_show_explains_a_failed_trainer(eternad: Eternad, state: Path) -> None:
    """Code and reason of the trainer's own report."""
    from strategies.request import RunReport

    failed = RunReport(run_id="npc-00003", status="failed", code="oom", reason="7 GiB needed, 6 GiB free")
    write(state / "runs" / "npc-00003" / "report.json", failed)
    assert "the trainer failed (oom): 7 GiB needed" in eternad("show", "npc-00003")


def test_show_a_version_tells_where_it_lies_and_what_made_it(eternad: Eternad, state: Path) -> None:
    """The version's files, then the run's numbers."""
    text = eternad("show", "npc@0002")
    assert "version 2 of npc: live" in text and "parent 1, run npc-00002" in text
    assert f"{state}/versions/npc/0002: 1 files, 7 B, base bbbbbbbbbbbb" in text
    assert "verdict: accepted" in text
    assert json.loads(eternad("show", "npc@2", "--json"))["manifest"]["number"] == 2


def test_show_a_file_tells_what_became_of_it(eternad: Eternad, state: Path) -> None:
    """By its path in the library, from wherever the command is called."""
    text = eternad("show", "content/npc/a.jsonl")
    assert re.search(r"npc +train +consumed +npc-00001 +9", text)
    assert eternad("show", str(state.parent / "library" / "content" / "npc" / "a.jsonl")) == text
    assert "line 3 (not_utf8)" in eternad("show", "content/npc/b.txt")
    assert json.loads(eternad("show", "content/npc/b.txt", "--json"))["quarantine"][0]["line"] == 3


def test_show_of_nothing_says_where_to_look(eternad: Eternad, state: Path) -> None:
    """An unknown name is one sentence."""
    assert "no run, version or known file; see: eternad history" in eternad("show", "npc@9", code=FAILED)


def test_the_audit_log_is_shown_and_verified(eternad: Eternad, state: Path) -> None:
    """Every move of every run; a change in the past is found."""
    text = eternad("log", "-n", "500")
    assert "run.TRAINING" in text and "version.live" in text and "npc@0002" in text
    assert eternad("log", "--verify") == "the audit log is whole\n"
    entries = [json.loads(line) for line in eternad("log", "--json", "-n", "3").splitlines()]
    assert [entry["id"] for entry in entries] == sorted(entry["id"] for entry in entries)
    connection = open_database(state / "eternad.db")
    connection.execute("UPDATE audit SET subject = 'other' WHERE id = 2")
    connection.close()
    assert "changed at row 2" in eternad("log", "--verify", code=FAILED)


def test_the_log_follows_what_happens(
    config: Path, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`log -f` prints each new row once."""
    from daemon.cli import past

    def happen(_seconds: float) -> None:
        connection = open_database(state / "eternad.db")
        with transaction(connection):
            if journal.pending(connection, "npc").train == 0:
                raise KeyboardInterrupt
            run = runs.create(connection, "book", "manual", None, 10)
            assert run is None
            connection.execute("UPDATE example SET state = 'retracted' WHERE state = 'pending'")
            from daemon.state import audit

            audit.write(connection, "tick", "once")
        connection.close()

    monkeypatch.setattr(past.time, "sleep", happen)
    assert cli.main(["log", "-f", "-n", "2"]) == 130
    assert capsys.readouterr().out.count("tick") == 1


def test_quarantine_lists_and_shows_without_obeying_control_characters(eternad: Eternad, state: Path) -> None:
    """What players write cannot colour or move the operator's terminal."""
    listed, shown = eternad("quarantine", "ls"), eternad("quarantine", "show", "1")
    assert "not_utf8" in listed and "\x1b" not in listed + shown
    assert "content/npc/b.txt, line 3" in shown and "\\x1b[31mred" in shown
    assert eternad("quarantine", "ls", "book") == "nothing is quarantined\n"
    assert json.loads(eternad("quarantine", "ls", "--json"))[0]["id"] == 1
    assert json.loads(eternad("quarantine", "show", "1", "--json"))["line"] == 3
    assert "no entry 7" in eternad("quarantine", "show", "7", code=FAILED)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("scan",), "scan None"), (("pause",), "pause None"), (("pause", "npc"), "pause npc"),
        (("resume", "npc"), "resume npc"), (("rollback", "npc", "1"), "rollback npc 1"),
        (("rollback", "npc", "base"), "rollback npc 0"), (("reload",), "reload None"),
        (("requeue", "npc-00003"), "requeue None"), (("quarantine", "retry"), "retry None None None"),
        (("quarantine", "drop", "1"), "drop None None 1"), (("update", "npc"), "run npc-00003 started"),
    ],
)  # fmt: skip
def test_orders_reach_the_daemon_and_its_answer_is_printed(
    eternad: Eternad, daemon_state: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Each command that changes something is carried out by the daemon."""
    assert eternad(*arguments).startswith(said)


@pytest.fixture(scope="module")
def module_state(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One answering daemon for all orders."""
    state = tmp_path_factory.mktemp("daemon") / "state"
    with answering(state):
        yield state


@pytest.fixture
def daemon_state(config: Path, module_state: Path) -> Path:
    """The configuration's state directory is that of the answering daemon."""
    config.write_text(config.read_text().replace('"state"', json.dumps(str(module_state))))
    return module_state


def test_a_refusal_is_exit_code_1(eternad: Eternad, daemon_state: Path) -> None:
    """The daemon's reason is the message."""
    assert "no run npc-9; see: eternad history" in eternad("cancel", "npc-9", code=FAILED)


def test_orders_without_a_daemon_are_exit_code_69(eternad: Eternad) -> None:
    """EX_UNAVAILABLE, with the command that starts one."""
    assert "start it with: eternad run" in eternad("scan", code=NOT_RUNNING)


def test_answers_are_json_for_scripts(eternad: Eternad, daemon_state: Path) -> None:
    """The reply as the daemon gave it."""
    assert json.loads(eternad("update", "npc", "--json"))["detail"] == {"run": "npc-00003"}


def test_update_wait_shows_progress_until_the_end(eternad: Eternad, state: Path) -> None:
    """Plain lines in a pipe; a run that is served is exit code 0."""

    def carry_out(command: Command) -> None:
        command.answer("run npc-00004 started", run="npc-00004")
        threading.Timer(0.3, finish).start()

    def finish() -> None:
        connection = open_database(state / "eternad.db")
        with transaction(connection):
            run = runs.get(connection, "npc-00004")
            for to in ("TRAINED", "EVALUATING"):
                run = runs.move(connection, run, to)
            runs.move(connection, run, "REJECTED", "nothing gained")
        connection.close()

    with answering(state, carry_out):
        message = eternad("update", "npc", "--wait", code=FAILED)
    assert "npc-00004 REJECTED: nothing gained; see: eternad show npc-00004" in message


def test_update_wait_prints_one_line_per_phase_and_tenth(
    config: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log of an update is short, whatever the number of steps is."""
    from daemon.cli.update import _lines

    connection = open_database(state / "eternad.db")
    run, show = runs.get(connection, "npc-00004"), _lines()
    connection.close()
    show(run, progress())
    show(run, progress())
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["npc-00004 TRAINING: train step 45/100  loss 1.250  312 tokens/s  12 s left"]


def test_the_progress_bar_is_unknown_then_counts_then_is_full(state: Path) -> None:
    """An update that stops early still ends with a full bar."""
    from daemon.cli.update import _share

    connection = open_database(state / "eternad.db")
    run = runs.get(connection, "npc-00004")
    connection.close()
    at = progress()
    assert _share(run, None) == (None, 0)
    assert _share(run, msgspec.structs.replace(at, phase="baseline")) == (None, 0)
    assert _share(run, at) == (100, 45)
    assert _share(run, msgspec.structs.replace(at, phase="evaluate")) == (100, 100)
    assert _share(msgspec.structs.replace(run, state="PUBLISHED"), at) == (100, 100)


def test_update_dry_run_says_what_would_be_learned(eternad: Eternad, state: Path) -> None:
    """Without a daemon, out of the journal alone."""
    text = eternad("update", "npc", "--dry-run")
    assert "3 new examples and rehearse 1 (of 1 wanted)" in text
    assert "from version 2, with replay" in text
    assert json.loads(eternad("update", "npc", "--dry-run", "--json"))["continues_from"] == 2
    assert "nothing waits for book" in eternad("update", "book", "--dry-run")


def test_rollback_dry_run_says_what_would_be_set_aside(eternad: Eternad, state: Path) -> None:
    """The parent by default; what later versions taught goes with them."""
    assert "served by 1 instead of 2; what versions 2 taught" in eternad("rollback", "npc", "--dry-run")
    assert "served by base instead of 2; what versions 1, 2" in eternad("rollback", "npc", "base", "--dry-run")
    assert "no version 9" in eternad("rollback", "npc", "9", "--dry-run", code=FAILED)
    assert "nothing to roll back" in eternad("rollback", "book", "--dry-run", code=FAILED)
    assert "is no version" in eternad("rollback", "npc", "two", "--dry-run", code=USAGE)


def test_the_buffer_is_shown_by_update_and_exported(eternad: Eternad, state: Path, tmp_path: Path) -> None:
    """What a model rehearses, and each example with its origin."""
    text = eternad("buffer", "show", "npc")
    assert "npc: 18 of at most 2000 examples (reservoir), 18 learned" in text
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()] if eternad(
        "buffer", "export", "npc", "-o", str(tmp_path / "out")
    ) else []  # fmt: skip
    assert len(rows) == 18
    assert rows[0] == {
        "update": 1, "file": "content/npc/a.jsonl", "line": 10,
        "example": {"completion": "a10", "prompt": "q10", "shape": "demonstration"},
    }  # fmt: skip


def test_a_wrong_model_name_gets_the_nearest(eternad: Eternad) -> None:
    """Exit code 2, as for any usage error."""
    assert "did you mean `npc`?" in eternad("update", "ncp", "--dry-run", code=USAGE)
    assert "there are: npc, book" in eternad("history", "zzzzzz", code=USAGE)


def test_a_bad_configuration_is_exit_code_78(eternad: Eternad, config: Path) -> None:
    """EX_CONFIG, and the daemon's own sentence: what, where, what to do."""
    config.write_text(config.read_text() + "\n[watch]\nstabilty_seconds = 3\n")
    for command in ("status", "history", "check-config"):
        assert "did you mean `stability_seconds`?" in eternad(command, code=BAD_CONFIG)


def test_the_configuration_is_found_by_option_environment_and_place(
    eternad: Eternad, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--config before or after the command, then $ETERNAD_CONFIG, then ./eternad.toml."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    moved = make_config(other)
    assert str(config.parent / "state") in eternad("status")
    assert str(other / "state") in eternad("status", "--config", str(moved))
    assert str(other / "state") in eternad("--config", str(moved), "status")
    monkeypatch.setenv("ETERNAD_CONFIG", str(moved))
    assert str(other / "state") in eternad("status")
    monkeypatch.chdir(other / "base")
    monkeypatch.delenv("ETERNAD_CONFIG")
    assert "Write a first one with: eternad init" in eternad("status", "-c", "nowhere.toml", code=BAD_CONFIG)
    assert context.config_path() == context.PLACES[0]


def test_init_writes_a_configuration_that_checks(eternad: Eternad, tmp_path: Path) -> None:
    """Ready to use once the base model is there; never over a file that exists."""
    text = eternad("init", "new.toml", "--model", "director")
    assert "eternad check-config --config new.toml" in text
    loaded = load(tmp_path / "new.toml")
    assert list(loaded.models) == ["director"]
    assert [type(each).__name__ for each in loaded.models["director"].strategy] == ["Replay"]
    assert "director (replay on local)" in eternad("check-config", "-c", "new.toml")
    assert json.loads(eternad("check-config", "-c", "new.toml", "--json"))["state_directory"] == str(tmp_path / "state")
    assert "exists: give another path" in eternad("init", "new.toml", code=FAILED)
    assert "must match" in eternad("init", "newer.toml", "--model", "A b", code=USAGE)


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


def test_colours_and_tables_only_where_a_person_looks(
    eternad: Eternad, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal gets colours unless NO_COLOR is set; a pipe gets none."""
    monkeypatch.setattr(screen, "is_terminal", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in eternad("status")
    assert "npc-00004" in eternad("history")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in eternad("status")
    assert "█" in eternad("status")


def test_usage_errors_are_exit_code_2(eternad: Eternad) -> None:
    """An unknown command, a missing argument."""
    assert "No such command" in eternad("frobnicate", code=USAGE)
    assert "Missing argument" in eternad("update", code=USAGE)


def test_a_reader_that_has_seen_enough_is_no_error(config: Path, state: Path) -> None:
    """`eternad log | head -1` ends without a traceback."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m daemon log -n 10000 | head -1"],
        cwd=config.parent, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )  # fmt: skip
    assert done.stderr == ""


def test_durations_and_sizes_are_for_people() -> None:
    """One number and a unit."""
    assert [screen.duration(each) for each in (-1, 8, 90, 200, 9000, 400000)] == [
        "0 s", "8 s", "90 s", "3 min", "2 h", "5 days",
    ]  # fmt: skip
    assert [screen.size(each) for each in (7, 2048, 3 << 20, 5 << 40)] == ["7 B", "2.0 KiB", "3.0 MiB", "5.0 TiB"]
    assert screen.ago(None) == "never" and screen.ago(time.time() - 120).endswith("ago")


def test_the_quick_counts_are_the_journals_own(state: Path) -> None:
    """Derived from the running totals, in any mixture of states."""
    from daemon.state import summary

    connection = open_database(state / "eternad.db")
    connection.execute("UPDATE example SET state = 'retracted' WHERE id IN (3, 11)")
    for model in ("npc", "book"):
        assert summary.example_counts(connection, model) == journal.counts(connection, model)
    connection.close()
