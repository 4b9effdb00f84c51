"""The gateway's table, split and event streams, without a server: compare-and-swap, kills, who gets what."""

import json
import os
import random
import signal
import time
from pathlib import Path

import msgspec
import pytest

from daemon.config import load
from daemon.gateway import server
from daemon.gateway.answers import EventStream, with_model
from daemon.gateway.split import choose, is_copied
from daemon.gateway.table import Conflict, InvalidRoute, Route, Table, TableFile, Target, check

URL = "http://127.0.0.1:1"
STEPS = ["TABLE:before", "TABLE:written", "TABLE:synced", "TABLE:renamed", "TABLE:after"]


def route(*weights: float, first: int = 1) -> Route:
    """npc@0001, npc@0002, ... with weights."""
    return Route(targets=[Target(version=f"npc@{first + n:04d}", urls=[URL], weight=w) for n, w in enumerate(weights)])


def test_a_writer_who_is_late_is_refused() -> None:
    """Two writers have seen generation 1; the second one gets a conflict, and the table stays the first one's."""
    table = Table().changed("npc", route(1), 0)
    assert table.generation == table.aliases["npc"].generation == 1
    moved = table.changed("npc", route(1, first=2), 1)
    with pytest.raises(Conflict, match="at generation 2, not 1"):
        moved.changed("npc", route(1, first=3), 1)
    with pytest.raises(Conflict, match="not 0"):
        moved.changed("npc", route(1, first=3), 0)
    assert moved.aliases["npc"].targets[0].version == "npc@0002"


def test_generations_never_come_again() -> None:
    """Removed and made anew: who has seen the first life cannot change the second."""
    table = Table().changed("npc", route(1), 0).changed("npc", None, 1).changed("npc", route(1), 0)
    assert table.aliases["npc"].generation == 3
    with pytest.raises(Conflict):
        table.changed("npc", None, 1)
    assert table.changed("npc", None, None).aliases == {}


def test_aliases_do_not_disturb_each_other() -> None:
    """A change of one leaves the other's generation."""
    table = Table().changed("npc", route(1), 0).changed("book", route(1), 0).changed("npc", route(2), 1)
    assert (table.aliases["book"].generation, table.aliases["npc"].generation, table.generation) == (2, 3, 3)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Route(targets=[]), "no targets"),
        (route(0), "one of them > 0"),
        (route(1, -1), "must be >= 0"),
        (route(float("inf")), "must be >= 0"),
        (Route(targets=[*route(1).targets, *route(1).targets]), "twice"),
        (Route(targets=[Target(version="a", urls=[])]), "no urls"),
        (Route(targets=[Target(version="a", urls=["ftp://x"])]), "neither http"),
        (Route(targets=[Target(version="a\r\nb", urls=[URL])]), "header"),
        (Route(targets=route(1).targets, shadow=Target(version="s", urls=[URL], weight=2)), "0 to 1"),
    ],
)
def test_routes_that_cannot_serve_are_refused(bad: Route, why: str) -> None:
    """Each with its reason."""
    with pytest.raises(InvalidRoute, match=why):
        check(bad)


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    """Whatever a route can say survives a restart; a file of somebody else is refused."""
    file = TableFile(tmp_path / "deep" / "aliases.json")
    assert file.read() == Table()
    shadow = Target(version="npc@0003", urls=["unix:/run/x.sock"], model="base:npc@0003", weight=0.5, extra={"a": [1]})
    table = Table().changed("npc", Route(targets=route(0.9, 0.1).targets, shadow=shadow), 0)
    file.write(table)
    assert file.read() == table
    file.path.write_text('{"format": "other/1"}')
    with pytest.raises(msgspec.DecodeError, match="other/1"):
        file.read()


def write_forever(file: TableFile, reports: int) -> None:
    """The child: change after change, each reported when it is durable."""
    table = file.read()
    while True:
        version = table.generation + 1
        table = table.changed("npc", route(1, first=version), None)
        file.write(table)
        os.write(reports, f"{table.generation}\n".encode())


def run_until_killed(file: TableFile, failpoint: str | None, seconds: float) -> int:
    """The last generation that a writer had reported before it was killed; 0 for none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ.pop("ETERNAD_FAILPOINT", None)
        if failpoint:
            os.environ["ETERNAD_FAILPOINT"] = failpoint
        write_forever(file, writing)
    os.close(writing)
    if failpoint is None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with os.fdopen(reading) as lines:
        return int((lines.read().splitlines() or ["0"])[-1])


def test_kill_minus_nine_between_any_two_steps(tmp_path: Path) -> None:
    """100 kills: the file is always whole, what was reported as durable is there, and at most one change more."""
    file, draw = TableFile(tmp_path / "aliases.json"), random.Random(0)
    failpoints = [f"{step}#{times}" for step in STEPS for times in range(1, 11)] + [None] * 50
    draw.shuffle(failpoints)
    before = 0
    for failpoint in failpoints:
        reported = run_until_killed(file, failpoint, draw.uniform(0.0, 0.02)) or before
        found = json.loads(file.path.read_bytes()) if file.path.exists() else {"generation": 0}
        table = file.read()
        assert found["generation"] == table.generation
        assert reported <= table.generation <= reported + 1
        if table.generation:
            assert table.aliases["npc"].targets[0].version == f"npc@{table.generation:04d}"
        before = table.generation
    assert before > 100


def test_the_split_keeps_its_shares() -> None:
    """20,000 sessions at 90 to 10, and 20,000 draws without a session: within five standard deviations (42)."""
    both, draw = route(9, 1), random.Random(1)
    sticky = sum(choose("npc", both, f"session-{n}").version == "npc@0002" for n in range(20_000))
    by_chance = sum(choose("npc", both, None, draw).version == "npc@0002" for _ in range(20_000))
    assert abs(sticky - 2000) < 212 and abs(by_chance - 2000) < 212


def test_a_session_keeps_its_version() -> None:
    """Always the same answer; and when the canary grows, nobody leaves it."""
    sessions = [f"session-{n}" for n in range(2000)]
    before: set[str] = set()
    for share in (1, 5, 25, 50, 100):
        there = {key for key in sessions if choose("npc", route(100 - share, share), key).version == "npc@0002"}
        assert there == {key for key in sessions if choose("npc", route(100 - share, share), key).version == "npc@0002"}
        assert before <= there
        before = there
    assert len(before) == 2000


def test_another_canary_is_tried_by_others() -> None:
    """Of 2000 sessions those who tried version 2 are not those who try version 3."""
    sessions = [f"session-{n}" for n in range(2000)]
    second = {key for key in sessions if choose("npc", route(9, 1), key).version == "npc@0002"}
    third = {key for key in sessions if choose("npc", route(9, 1, first=2), key).version == "npc@0003"}
    assert len(second & third) < 50 < len(third)


def test_weight_zero_gets_nothing() -> None:
    """Not even at the borders of the interval."""
    draw = random.Random(2)
    assert {choose("npc", route(0, 1, 0), None, draw).version for _ in range(500)} == {"npc@0002"}


def test_a_shadow_gets_its_share() -> None:
    """None without a shadow; a quarter of 8,000 within five standard deviations (39)."""
    draw, shadow = random.Random(3), Target(version="s", urls=[URL], weight=0.25)
    assert not is_copied(route(1), draw)
    copied = sum(is_copied(Route(targets=route(1).targets, shadow=shadow), draw) for _ in range(8000))
    assert abs(copied - 2000) < 195


def test_the_version_is_put_into_a_body() -> None:
    """Only `model` changes; a body that says it already, or has no such field, stays byte for byte."""
    body = b'{"id": "x",  "model":"base:npc", "n": 1.50}'
    assert with_model(body, "npc@0001") == b'{"id":"x","model":"npc@0001","n":1.50}'
    for same in (b'{"model": "npc@0001" }', b'{"error": {}}', b"[1]", b"no json", b""):
        assert with_model(same, "npc@0001") is same


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_the_version_is_put_into_events_wherever_they_are_cut(size: int) -> None:
    """Comments, other fields and the end are left alone."""
    stream = b': ping\n\nevent: x\r\ndata: {"model":"b","i":1}\r\n\r\ndata:{"model":"b","i":2}\n\ndata: [DONE]\n\n'
    events = EventStream("npc@0001")
    passed = b"".join(events.feed(stream[at : at + size]) for at in range(0, len(stream), size)) + events.rest()
    assert passed == (
        b': ping\n\nevent: x\r\ndata: {"model":"npc@0001","i":1}\r\n\r\n'
        b'data: {"model":"npc@0001","i":2}\n\ndata: [DONE]\n\n'
    )


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_events_that_say_the_version_pass_untouched(size: int) -> None:
    """Byte for byte."""
    stream = b'data: {"model": "npc@0001",  "i":1}\n\ndata: {"model":"other?"}\n\nrest without an end'
    events = EventStream("npc@0001")
    passed = b"".join(events.feed(stream[at : at + size]) for at in range(0, len(stream), size)) + events.rest()
    assert passed == stream


def test_a_credential_is_found_where_systemd_puts_it_for_each_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One configuration, two units: each reads the token from its own directory, and the gateway shows it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    path = tmp_path / "eternad.toml"
    path.write_text(
        'library_directory = "l"\nstate_directory = "s"\n[models.npc]\nbase_path = "base"\nengine = "e"\n'
        '[engines.e]\nurls = ["http://127.0.0.1:1?x=y"]\ntoken_file = "credential:gateway_engine"\n'
    )
    for unit in ("eternad.service", "eternad-gateway.service"):
        (tmp_path / unit).mkdir()
        (tmp_path / unit / "eternad_gateway_engine").write_text(f"secret of {unit}\n")
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / unit))
        assert server._tokens(load(path)) == {"http://127.0.0.1:1": f"secret of {unit}"}
