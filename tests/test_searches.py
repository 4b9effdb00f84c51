"""Searches that begin by themselves: when, that they outlive the daemon, what becomes of their answer and leftovers."""

import asyncio
import fcntl
import queue
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_kit import make_config

from daemon import overview, retention
from daemon.service import searches as module
from daemon.service.house import House
from daemon.service.searches import Searches
from daemon.state import audit
from daemon.state.database import Connection, set_setting, setting, transaction
from daemon.tuning import outcome
from daemon.tuning.rules import Ended, Tuning, is_due
from daemon.web import pages
from daemon.web.app import build
from strategies.objective import Score
from strategies.search import Trial

NO, YES = "REJECTED", "LIVE"


@pytest.mark.parametrize(
    ("states", "searched_at", "reason"),
    [
        ([NO, NO, NO], 0.0, "rejected"),
        ([NO, NO, YES, NO], 0.0, None),
        ([NO, YES, NO], 0.0, None),
        ([NO, NO, NO], 98.5, None),  # only one of them came after the last search
        ([], 0.0, None),
    ],
)
def test_a_search_begins_after_rejections_in_a_row(states: list[str], searched_at: float, reason: str | None) -> None:
    """Newest first, and only those that the last search could not know."""
    ended = [Ended(state, 99.0 - place) for place, state in enumerate(states)]
    assert is_due(Tuning(after_rejected=3), ended, searched_at, 100.0) == reason
    assert is_due(Tuning(), ended, searched_at, 100.0) is None


def test_a_search_begins_so_long_after_the_one_before() -> None:
    """Not without a new run: nothing would be different. A clock that was set back does not postpone it for ever."""
    rules = Tuning(interval_seconds=50.0)
    assert is_due(rules, [Ended(YES, 99.0)], 40.0, 100.0) == "interval"
    assert is_due(rules, [Ended(YES, 99.0)], 60.0, 100.0) is None
    assert is_due(rules, [Ended(YES, 39.0)], 40.0, 100.0) is None
    assert is_due(rules, [Ended(YES, 1000.0)], 900.0, 100.0) == "interval"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A state directory whose model searches every second."""
    found = House(make_config(tmp_path, tuning=Tuning(interval_seconds=1.0)))
    yield found
    found.close()


def searches(house: House, monkeypatch: pytest.MonkeyPatch, program: str, reloaded: list[int]) -> Searches:
    """With a few lines of Python in the place of the command."""
    monkeypatch.setattr(module, "COMMAND", [sys.executable, "-c", program])
    monkeypatch.setattr(Searches, "_ended", lambda self, name: [Ended(YES, time.time())])
    return Searches(house, Path("/etc/eternad.toml"), lambda: reloaded.append(1))


def follow(given: Searches, house: House, seconds: float = 20.0) -> None:
    """Until the search at work has ended."""
    deadline = time.monotonic() + seconds
    while setting(house.database, "searching/npc"):
        given.advance(time.time())
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events(connection: Connection) -> list[tuple[str, dict[str, Any]]]:
    return [(entry.event, entry.detail) for entry in audit.entries(connection)]


@pytest.mark.parametrize("policy", ["ask", "apply"])
def test_the_policy_decides_whether_the_answer_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any
) -> None:
    """`ask` only leaves it; `apply` hands `--apply` to the command and reads the configuration anew."""
    house = House(make_config(tmp_path, tuning=Tuning(interval_seconds=1.0, policy=policy)))
    reloaded: list[int] = []
    given = searches(house, monkeypatch, "import sys; print(sys.argv[1:])", reloaded)
    given.advance(time.time())
    follow(given, house)
    said = (house.config.state_directory / "tuning" / "npc" / "search.log").read_text()
    assert "'npc', '--config', '/etc/eternad.toml'" in said and ("--apply" in said) == (policy == "apply")
    assert reloaded == [1] * (policy == "apply")
    assert events(house.database) == [
        ("search", {"policy": policy, "reason": "interval"}), ("search_ended", {"status": 0}),
    ]  # fmt: skip
    house.close()


def test_a_search_that_the_daemon_left_is_taken_up_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM at the daemon's end; its next start goes on, although nothing is due."""
    given = searches(house, monkeypatch, "import time; time.sleep(60)", [])
    given.advance(time.time())
    assert overview._search(house.config, house.database, "npc") == "searching for better settings (interval)"
    given.stop()
    assert setting(house.database, "searching/npc") == "interval"
    again = searches(house, monkeypatch, "", [])
    monkeypatch.setattr(Searches, "_ended", lambda self, name: [])
    again.advance(time.time())
    follow(again, house)
    assert [name for name, _ in events(house.database)] == ["search", "search", "search_ended"]


def test_a_search_that_fails_is_said_once(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With its last words; it is not begun again at once."""
    given = searches(house, monkeypatch, "import sys; sys.exit('eternad: needs optuna')", [])
    given.advance(time.time())
    follow(given, house)
    assert "ended with status 1; its last words: eternad: needs optuna" in caplog.text
    with transaction(house.database) as connection:
        set_setting(connection, "searched/npc", repr(time.time() + 0.5))
    given.advance(time.time())
    assert not setting(house.database, "searching/npc")


def test_old_searches_go_but_not_one_at_work(tmp_path: Path) -> None:
    """The newest stay; the lock of a search protects it however old it is."""
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "lock").touch()
        time.sleep(0.01)
    (tmp_path / "search.log").touch()
    with (tmp_path / "0" / "lock").open("r+") as lock:
        before = (tmp_path / "0" / "lock").stat().st_mtime
        fcntl.flock(lock, fcntl.LOCK_EX)
        removals = retention.old_searches(tmp_path, 2)
        assert (tmp_path / "0" / "lock").stat().st_mtime == before
    assert [removal.path.name for removal in removals] == ["2", "1"]


def test_the_page_and_the_status_show_what_was_found(house: House) -> None:
    """Charts of the trials, and the proposal as long as the configuration does not say it."""
    assert pages.search(house.config, "npc") is None
    trials = [
        Trial(number=n, state="finished", values={}, score=Score(gain=n, rise=n / 2, drift=0.1), value=n / 2)
        for n in range(3)
    ]
    directory = house.config.state_directory / "tuning" / "npc" / "abc"
    directory.mkdir(parents=True)
    result = outcome.Result(
        model="npc", sampler="tpe", updates=[1, 2, 3], space=[], trials=trials, best=2, front=[0, 1, 2],
        importance={"training.epochs": 0.7, "lora.rank": 0.3}, comparison=None, changes={"training.epochs": 5},
        difference="+epochs = 5",
    )  # fmt: skip
    outcome.keep(directory, result)
    found = pages.search(house.config, "npc")
    assert found is not None and found["is_open"]
    assert all("<svg" in picture for picture in found["pictures"].values())
    assert "training.epochs" in found["pictures"]["Importance"]
    said = overview._search(house.config, house.database, "npc")
    assert said == "better settings were found: eternad tune npc --accept"
    body = asyncio.run(_page(house, "/models/npc"))
    assert "better settings were found" in body and body.count("<figure>") == 3 and "+epochs = 5" in body


async def _page(house: House, path: str) -> str:
    app = build(lambda: house.config, queue.Queue(), dict)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        answer = await client.get(path)
    assert answer.status_code == 200
    return answer.text
