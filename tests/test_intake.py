"""Intake over HTTP: what is acknowledged is on disk, what is refused leaves nothing, and a full house says so."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from typer.testing import CliRunner

from daemon import ingest, intake
from daemon.cli.app import app
from daemon.config import Config, ConfigError, Engine, Intake, Model, load
from daemon.ingest.problem import Problem
from daemon.state import records
from daemon.state.database import open_database
from daemon.state.files import Finished, Signature
from daemon.trust.metric import Metric
from daemon.trust.policy import Source, Trust

DAY = "intake-2027-01-15.jsonl"


def record(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A good boolean record."""
    return {
        "schema": "eternad.feedback/1", "id": f"01990000-0000-7000-8000-{number:012x}", "ts": "2026-11-22T20:00:00Z",
        "kind": "boolean", "model": "npc", "input": {"messages": [{"role": "user", "content": f"Question {number}?"}]},
        "output": {"messages": [{"role": "assistant", "content": "Shown."}]}, "metric": "thumb", "value": True,
        "subject": {"id": f"h:{number:016x}"}, "source": {"app": "game", "channel": "hall", "reporter": "player"},
    } | changes  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The model `npc`."""
    return Config(
        library_directory=tmp_path / "library", state_directory=tmp_path / "state",
        models={"npc": Model(base_path=tmp_path, engine="embedded")}, engines={"embedded": Engine()},
        trust=Trust(sources={"game": Source(trusted=True)}),
    )  # fmt: skip


@pytest.fixture
def client(config: Config, tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a running endpoint."""
    path = tmp_path / "intake.sock"
    reached = msgspec.structs.replace(config, intake=Intake(socket=path))
    handle = intake.serve(lambda: reached, lambda: 1_800_000_000.0)
    assert handle is not None
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path), retries=20), base_url="http://intake") as made:
        for _ in range(200):
            try:
                made.get("/")
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        yield made
    handle.close()


def lines(config: Config, source: str = "game") -> list[Any]:
    """What is in a source's file."""
    path = config.library_directory / "feedback/npc" / source / DAY
    return [msgspec.json.decode(line) for line in path.read_bytes().split(b"\n") if line] if path.exists() else []


def test_an_acknowledged_record_is_in_the_drop_directory(client: httpx.Client, config: Config) -> None:
    """One record, or several, one a line; from there it is taken in like any file."""
    one = client.post("/v1/feedback/npc/game", json=record(1))
    assert (one.status_code, one.json()) == (202, {"ids": [record(1)["id"]]})
    two = client.post("/v1/feedback/npc/game", content=b"\n".join(msgspec.json.encode(record(n)) for n in (2, 3)))
    assert len(two.json()["ids"]) == 2
    assert lines(config) == [record(1), record(2), record(3)]
    name = f"feedback/npc/game/{DAY}"
    seen = os.lstat(config.library_directory / name)
    signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
    database = open_database(config.state_directory / "eternad.db")
    ingest.ingest_file(database, config, Finished(path=name, relative=name, signature=signature), 1.8e9)
    assert records.counts(database, "npc") == {"boolean/journal": 3}
    database.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("npc/game", b"{", 422, "invalid_json"),
        ("npc/game", b"", 422, "bad_record"),
        (
            "npc/game",
            msgspec.json.encode(record(1)) + b"\n" + msgspec.json.encode(record(2, value=3)),
            422,
            "bad_record",
        ),
        ("npc/game", msgspec.json.encode(record(1, model="book")), 422, "model_mismatch"),
        ("npc/game", msgspec.json.encode(record(1, subject={"id": "ann@example.org"})), 422, "raw_subject"),
        ("npc/game", b"\n".join([b"{}"] * 1001), 413, "too_large"),
        ("npc/game", b" " * (4 * 1024 * 1024 + 1), 413, "too_large"),
        ("book/game", msgspec.json.encode(record(1)), 404, "unknown_model"),
        ("npc/..%2f..%2fetc", msgspec.json.encode(record(1)), 404, None),
        ("npc/UPPER", msgspec.json.encode(record(1)), 404, "unknown_model"),
    ],
)
def test_a_bad_request_leaves_nothing(
    client: httpx.Client, config: Config, path: str, body: bytes, status: int, code: str | None
) -> None:
    """All records of a request are in order, or none is taken."""
    answer = client.post(f"/v1/feedback/{path}", content=body)
    assert answer.status_code == status
    assert code is None or answer.json()["code"] == code
    assert lines(config) == [] and not list(config.library_directory.rglob("*.jsonl"))


def test_a_port_asks_for_the_token(config: Config, tmp_path: Path) -> None:
    """Any program of the machine reaches it; the socket beside it has a group and asks for nothing."""
    (tmp_path / "token").write_text("s3cret\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    door = Intake(socket=tmp_path / "intake.sock", listen=f"127.0.0.1:{port}", token_file=tmp_path / "token")
    reached = msgspec.structs.replace(config, intake=door)
    handle = intake.serve(lambda: reached, lambda: 1_800_000_000.0)
    assert handle is not None
    url, body = f"http://127.0.0.1:{port}/v1/feedback/npc/game", record(1)
    with httpx.Client(transport=httpx.HTTPTransport(retries=20)) as client:
        for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ""}):
            assert client.post(url, json=body, headers=shown).status_code == 401
        assert lines(config) == []
        assert client.post(url, json=body, headers={"Authorization": "Bearer s3cret"}).status_code == 202
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(door.socket)), base_url="http://intake") as client:
        assert client.post("/v1/feedback/npc/game", json=record(2)).status_code == 202
    handle.close()
    assert len(lines(config)) == 2 and intake.serve(lambda: config, time.time) is None


@pytest.mark.parametrize(("keys", "why"), [
    ('listen = "127.0.0.1:1"', "needs `token_file`"),
    ('listen = "0.0.0.0:1"\ntoken_file = "x"', "must be a loopback address"),
])  # fmt: skip
def test_a_port_without_a_token_is_refused(tmp_path: Path, keys: str, why: str) -> None:
    """So is one that other machines reach."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "eternad.toml").write_text(
        'library_directory = "library"\nstate_directory = "state"\n[engines.e]\n[models.npc]\nbase_path = "base"\n'
        f'engine = "e"\n[intake]\n{keys}\n'
    )
    with pytest.raises(ConfigError, match=why):
        load(tmp_path / "eternad.toml")


def test_values_are_checked_against_the_metrics_of_the_configuration(config: Config) -> None:
    """A number beyond the range of its metric is told to whoever sends it, and by `feedback validate`."""
    metrics = {"stars": Metric(type="float", low=1, high=5)}
    good = msgspec.json.encode(record(1, kind="float", metric="stars", value=4.5))
    assert intake.check(good, "npc", 4096, metrics)[0] == [record(1)["id"]]
    for changes in ({"kind": "float", "value": 7}, {"kind": "float", "value": 0.5}, {"kind": "boolean", "value": True}):
        with pytest.raises(Problem) as raised:
            intake.check(msgspec.json.encode(record(1, metric="stars", **changes)), "npc", 4096, metrics)
        assert (raised.value.code, raised.value.line) == ("metric_mismatch", 1)
    assert intake.check(msgspec.json.encode(record(1, kind="float", metric="pages", value=7)), "npc", 4096, metrics)


def test_a_file_is_validated_with_the_metrics_of_a_configuration(tmp_path: Path) -> None:
    """`eternad feedback validate --config`."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "eternad.toml").write_text(
        'library_directory = "library"\nstate_directory = "state"\n[engines.e]\n[models.npc]\nbase_path = "base"\n'
        'engine = "e"\n[metrics.stars]\ntype = "float"\nlow = 1\nhigh = 5\n'
    )
    file = tmp_path / "records.jsonl"
    file.write_bytes(b"".join(
        msgspec.json.encode(record(number, kind="float", metric="stars", value=number)) + b"\n" for number in (3, 9)
    ))  # fmt: skip
    command = ["feedback", "validate", str(file), "--model", "npc", "--json"]
    assert CliRunner().invoke(app, command).exit_code == 0
    said = CliRunner().invoke(app, [*command, "--config", str(tmp_path / "eternad.toml")])
    assert said.exit_code == 1, said.output
    assert [(row["line"], row["code"]) for row in json.loads(said.stdout)["bad"]] == [(2, "metric_mismatch")]


def test_a_line_that_a_kill_tore_does_not_harm_the_next(client: httpx.Client, config: Config) -> None:
    """The torn one was never acknowledged."""
    path = config.library_directory / "feedback/npc/game" / DAY
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"torn')
    client.post("/v1/feedback/npc/game", json=record(1))
    assert path.read_bytes().split(b"\n")[0] == b'{"torn'
    assert msgspec.json.decode(path.read_bytes().split(b"\n")[1]) == record(1)


def test_many_requests_share_an_fsync(config: Config) -> None:
    """Group commit: what waits while the disk is busy is written together."""

    async def send() -> int:
        journal = intake.Journal(config.library_directory, lambda: 1_800_000_000.0)
        writer = asyncio.create_task(journal.run())
        await asyncio.gather(*(journal.append("npc/game", b"%d\n" % number) for number in range(500)))
        writer.cancel()
        return journal.fsyncs_total

    assert asyncio.run(send()) < 50
    assert sorted(lines(config)) == list(range(500))


def test_a_full_house_says_when_to_come_again(
    client: httpx.Client, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back-pressure instead of memory."""
    monkeypatch.setattr(intake, "WAITING_MAX", 0)
    answer = client.post("/v1/feedback/npc/game", json=record(1))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert lines(config) == []


def test_what_cannot_be_written_is_not_acknowledged(client: httpx.Client, config: Config) -> None:
    """The producer is told to send it again, and when the disk is back it is taken."""
    place = config.library_directory / "feedback/npc/game"
    place.parent.mkdir(parents=True)
    place.write_text("in the way")
    assert client.post("/v1/feedback/npc/game", json=record(1)).status_code == 503
    place.unlink()
    assert client.post("/v1/feedback/npc/game", json=record(1)).status_code == 202
    assert lines(config) == [record(1)]
