"""Rollouts: a version on trial gets a share of live requests, and goes on, back or waits by what they say."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rollout_kit import MemoryGateway
from service_kit import drop, make_config, turn_until, use_trainer

from buffers import claims, journal
from daemon import failpoint
from daemon.config import ConfigError, load
from daemon.control import Action, Command, Order, Reply
from daemon.engines.exposure import Split
from daemon.rollout import Counts, Rollout, Signals, Stage, add, chance, judge, stages
from daemon.service import Service, serving
from daemon.state import audit, records, rollouts, runs
from daemon.state.database import transaction
from daemon.state.records import RecordRow

Make = Callable[..., Service]
QUICK = Rollout(policy="canary", percentages=[10.0, 50.0], soak_seconds=0.05, requests_min=20)


# -- the judgement, pure ----------------------------------------------------------------------------------------------


def test_a_policy_is_a_list_of_stages() -> None:
    """Nothing for `immediate`; the comparison comes before any share."""
    assert stages(Rollout()) == []
    assert stages(QUICK) == [Stage("canary", 10.0), Stage("canary", 50.0)]
    both = msgspec.structs.replace(QUICK, policy="shadow_canary", shadow_percent=3.0)
    assert stages(both) == [Stage("shadow", 3.0), Stage("canary", 10.0), Stage("canary", 50.0)]
    assert stages(msgspec.structs.replace(both, policy="shadow")) == [Stage("shadow", 3.0)]


def test_chance_is_the_binomials_tail() -> None:
    """Against values by hand: 2 of 2 at 0.1 is 0.01; 1 of 3 at 0.1 is 1 - 0.9^3."""
    assert chance(2, 2, 0.1) == pytest.approx(0.01)
    assert chance(1, 3, 0.1) == pytest.approx(1 - 0.9**3)
    assert chance(3, 5, 0.2) == pytest.approx(10 * 0.2**3 * 0.8**2 + 5 * 0.2**4 * 0.8 + 0.2**5)
    assert chance(1, 1000, 0.1) == 1.0 and chance(1, 10, 0.0) == 0.0


GOOD = Counts(answered=100, first_byte_ms=10.0)


@pytest.mark.parametrize(
    ("candidate", "seconds", "outcome", "reason"),
    [
        (GOOD, 0.0, "wait", "to go"),
        (GOOD, 700.0, "pass", "every check"),
        (Counts(answered=10), 700.0, "wait", "10 of 50 requests"),
        (Counts(answered=10), 90000.0, "fail", "inconclusive: only 10 of 50 requests"),
        (Counts(failed=1), 1.0, "wait", "to go"),  # one of one may be chance
        (Counts(answered=2, failed=6), 1.0, "fail", "error rate 0.75 above 0.02"),
        (Counts(answered=96, failed=4), 1.0, "wait", "to go"),
        (Counts(answered=96, failed=4), 700.0, "fail", "error rate 0.04 above 0.02"),
        (Counts(answered=100, first_byte_ms=34.0), 700.0, "pass", "every check"),  # within the slack
        (Counts(answered=100, first_byte_ms=36.0), 1.0, "fail", "latency ms 36 above 35"),
        (Counts(answered=10, first_byte_ms=99.0), 1.0, "wait", "to go"),  # too few for a median
        (Counts(answered=100, feedback=1, complaints=1), 700.0, "pass", "every check"),
        (Counts(answered=100, feedback=10, complaints=8), 1.0, "fail", "complaint rate 0.8 above 0.15"),
    ],
)  # fmt: skip
def test_a_stage_waits_passes_or_fails(candidate: Counts, seconds: float, outcome: str, reason: str) -> None:
    """By limits against the live version's numbers; early only by what chance does not explain."""
    stable = Counts(answered=1000, first_byte_ms=10.0, feedback=100, complaints=5)
    said = judge(Rollout(), "canary", Signals(candidate=candidate, stable=stable), seconds)
    assert (said.outcome, reason in said.reason) == (outcome, True), said


def test_a_comparison_fails_by_its_divergence() -> None:
    """Once there are enough pairs."""
    signals = Signals(candidate=GOOD, stable=GOOD, pairs=100, divergence=90.0)
    assert judge(Rollout(), "shadow", signals, 1.0).reason == "divergence 0.9 above 0.8"
    assert judge(Rollout(divergence_max=0.95), "shadow", signals, 700.0).outcome == "pass"


def counted(epoch: str, answered: int, failed: int = 0) -> dict[str, Any]:
    row = {"answered": answered, "failed": failed, "first_byte_ms": {"p50": 10.0}}
    return {"epoch": epoch, "versions": {"new": row, "old": {**row, "failed": 0}}, "comparisons": {}}


def test_what_the_gateway_counts_is_summed_over_its_restarts() -> None:
    """What was there before the stage counts nothing; after a restart the counters begin at zero."""
    signals = Signals()
    for traffic in (counted("a", 1000), counted("a", 1010, 1), counted("b", 5, 2), counted("b", 5, 2), counted("b", 1)):
        signals = add(signals, traffic, "new", "old", "canary")
    assert (signals.candidate.answered, signals.candidate.failed, signals.stable.answered) == (16, 3, 16)


def test_a_configuration_without_gateway_cannot_split(tmp_path: Path) -> None:
    """It says what is missing; with the gateway it is taken. Shares must grow."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    text = (
        'library_directory = "l"\nstate_directory = "s"\n[engines.e]\nkind = "vllm"\nurls = ["http://127.0.0.1:1"]\n'
        '[models.npc]\nbase_path = "base"\nengine = "e"\n[models.npc.rollout]\npolicy = "canary"\n'
    )
    path = tmp_path / "eternad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="only the gateway does"):
        load(path)
    path.write_text(text + '[gateway]\naddress = "127.0.0.1:8080"\n')
    assert load(path).models["npc"].rollout.policy == "canary"
    path.write_text(text + 'percentages = [50, 10]\n[gateway]\naddress = "127.0.0.1:8080"\n')
    with pytest.raises(ConfigError, match="give shares that grow"):
        load(path)


# -- the whole way, with an engine in memory --------------------------------------------------------------------------


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> MemoryGateway:
    memory = MemoryGateway()
    monkeypatch.setattr(serving, "build", lambda *settings: memory)
    return memory


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gateway: MemoryGateway) -> Iterator[Make]:
    """Opens the same state again and again; engines are looked at in every turn."""
    use_trainer(tmp_path / "lab", monkeypatch)
    opened: list[Service] = []

    def close() -> None:
        for service in opened:
            service.updates.stop()
            service.serving._threads.shutdown(wait=True)
            service.house.close()
        opened.clear()

    def start(**model: Any) -> Service:
        close()
        config = make_config(tmp_path, **{"rollout": QUICK} | model)
        engines = {name: msgspec.structs.replace(each, reconcile_seconds=0.02) for name, each in config.engines.items()}
        service = Service(msgspec.structs.replace(config, engines=engines), tmp_path / "eternad.toml")
        opened.append(service)
        return service

    yield start
    close()


def state_of(service: Service) -> str:
    return runs.recent(service.house.database, "npc", 1)[0].state


def order(service: Service, action: Action, **fields: Any) -> Reply:
    command = Command(Order(action=action, model="npc", **fields), actor="uid:0")
    service.orders.carry_out(command)
    return command.wait(0.1)


def to_canary(service: Service, gateway: MemoryGateway, numbers: range) -> None:
    """A drop whose version gets its first share."""
    drop(service, numbers)
    turn_until(service, lambda: "npc" in gateway.shares)
    turn_until(service, lambda: state_of(service) == "CANARY")


def with_live(make: Make, gateway: MemoryGateway, **model: Any) -> Service:
    """Version 1 is live, as if by another policy; version 2 on trial."""
    service = make(rollout=Rollout())
    drop(service, range(10))
    turn_until(service, lambda: runs.live_version(service.house.database, "npc") is not None)
    service = make(**model)
    to_canary(service, gateway, range(10, 20))
    return service


def busy(gateway: MemoryGateway, **candidate: Any) -> Callable[[], None]:
    """Players go on asking: both versions answer."""

    def ask() -> None:
        gateway.answer("npc@0001", 100)
        gateway.answer("npc@0002", **{"answered": 30} | candidate)

    return ask


def turn_busily(service: Service, ask: Callable[[], None], condition: Callable[[], object]) -> None:
    def asked() -> object:
        ask()
        return condition()

    turn_until(service, asked)


def events(service: Service) -> list[str]:
    return [entry.event for entry in audit.entries(service.house.database, 1000) if entry.event.startswith("rollout.")]


def trial_of(service: Service) -> rollouts.Trial:
    return rollouts.latest(service.house.database, "npc")[0]


def test_a_canary_grows_to_all_requests(make: Make, gateway: MemoryGateway) -> None:
    """10 %, 50 %, then live: examples are consumed only then, and nobody had to do anything."""
    service = with_live(make, gateway)
    assert journal.counts(service.house.database, "npc")["train/claimed"] == 9
    turn_busily(service, busy(gateway), lambda: state_of(service) == "LIVE")
    shares = [split.share for _, split in gateway.seen if split is not None]
    assert shares == [0.1, 0.5] and gateway.table == {"npc": "npc@0002"} and gateway.shares == {}
    assert events(service) == ["rollout.canary", "rollout.canary", "rollout.promoted"]
    assert journal.counts(service.house.database, "npc")["train/consumed"] == 18
    assert [version.state for version in runs.versions(service.house.database, "npc")] == ["live", "superseded"]


def test_the_first_version_is_tried_against_the_base(make: Make, gateway: MemoryGateway) -> None:
    """The base is the stable version."""
    service = make()
    to_canary(service, gateway, range(10))
    assert gateway.table == {"npc": "base"}
    turn_busily(service, lambda: gateway.answer("npc@0001", 30), lambda: state_of(service) == "LIVE")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [({"answered": 10, "failed": 10}, "error rate"), ({"answered": 30, "ms": 90.0}, "latency ms 90 above 35")],
)
def test_what_does_badly_is_rolled_back(
    make: Make, gateway: MemoryGateway, answers: dict[str, Any], reason: str
) -> None:
    """By itself and with the reason; its examples wait again, with a failure counted; the live version serves on."""
    service = with_live(make, gateway)
    turn_busily(service, busy(gateway, **answers), lambda: state_of(service) == "ROLLED_BACK")
    turn_until(service, lambda: gateway.shares == {})
    assert gateway.table == {"npc": "npc@0001"}
    run = runs.recent(service.house.database, "npc", 1)[0]
    assert reason in run.reason and reason in trial_of(service).reason
    assert claims.pending(service.house.database, "npc").train == 9
    assert runs.failures_in_a_row(service.house.database, "npc")[0] == 1
    live = runs.live_version(service.house.database, "npc")
    assert live is not None and live.number == 1
    assert trial_of(service).outcome == "rolled_back"


class Crash(BaseException):
    """What kill -9 is to a process: nothing of the step is cleaned up."""


@pytest.mark.parametrize("point", ["ROLLED_BACK:before", "ROLLED_BACK:after"])
def test_a_crash_around_a_rollback_leaves_nothing_half(make: Make, gateway: MemoryGateway, point: str) -> None:
    """Before the transaction the trial is judged again, after it the share goes: the live version serves on."""

    def reach(name: str) -> None:
        if name == point:
            raise Crash

    service = with_live(make, gateway)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(failpoint, "reach", reach)
        turn_busily(service, busy(gateway, answered=10, failed=10), lambda: False)
    service = make()
    turn_busily(service, busy(gateway, answered=10, failed=10), lambda: gateway.shares == {})
    assert (state_of(service), gateway.table) == ("ROLLED_BACK", {"npc": "npc@0001"})
    assert trial_of(service).outcome == "rolled_back"
    assert claims.pending(service.house.database, "npc").train == 9


def say(service: Service, number: int, value: object, adapter: str, kind: str = "boolean") -> None:
    """A believed feedback record on an answer of this version."""
    body = {"value": value, "inference": {"id": str(number), "adapter": adapter}}
    row = RecordRow(
        model="npc", id=str(number), kind=kind, source="game", subject=f"h:{number:08d}", body_sha256="-",
        body=msgspec.json.encode(body), state="journal",
    )  # fmt: skip
    with transaction(service.house.database) as connection:
        records.add(connection, [row], time.time())


def test_players_who_complain_roll_it_back(make: Make, gateway: MemoryGateway) -> None:
    """Bad ratings and corrections that cite the version, against what the live one gets."""
    service = with_live(make, gateway, rollout=msgspec.structs.replace(QUICK, soak_seconds=60.0))
    for number in range(12):
        say(service, number, False, "npc@0002", "boolean" if number % 2 else "demonstration")
        say(service, 100 + number, True, "npc@0001")
        say(service, 200 + number, False, "elsewhere@0002")
    turn_busily(service, busy(gateway), lambda: state_of(service) == "ROLLED_BACK")
    assert trial_of(service).reason == "complaint rate 1 above 0.1"
    assert trial_of(service).signals.stable == msgspec.structs.replace(
        trial_of(service).signals.stable, feedback=12, complaints=0
    )


def test_an_engine_that_answers_otherwise_ends_the_trial(make: Make, gateway: MemoryGateway) -> None:
    """The fingerprint is looked at as long as the trial lasts."""
    service = with_live(make, gateway)
    gateway.fault = "lies"
    turn_until(service, lambda: state_of(service) == "ROLLED_BACK")
    assert "fingerprint: npc@0002: the engine answers like the base" in trial_of(service).reason
    assert gateway.shares == {} and gateway.table == {"npc": "npc@0001"}


def test_a_comparison_comes_before_anybody_sees_it(make: Make, gateway: MemoryGateway) -> None:
    """Shadow first: no share until answers were compared; then the canary's shares."""
    plan = msgspec.structs.replace(QUICK, policy="shadow_canary", percentages=[20.0], shadow_percent=40.0)
    service = with_live(make, gateway, rollout=plan)
    assert gateway.shares["npc"] == Split(candidate="npc@0002", share=0.4, is_shadow=True)
    turn_until(service, lambda: trial_of(service).signals.epoch)
    gateway.compare("npc@0002", 40, 0.3)
    turn_until(service, lambda: trial_of(service).kind == "canary")
    turn_busily(service, busy(gateway), lambda: state_of(service) == "LIVE")
    kinds = [(split.is_shadow, split.share) for _, split in gateway.seen if split is not None]
    assert kinds == [(True, 0.4), (False, 0.2)]


def test_a_comparison_that_diverges_ends_it_unseen(make: Make, gateway: MemoryGateway) -> None:
    """No request of a player was ever answered by it."""
    service = with_live(make, gateway, rollout=msgspec.structs.replace(QUICK, policy="shadow"))
    turn_until(service, lambda: trial_of(service).signals.epoch)
    gateway.compare("npc@0002", 40, 0.95)
    turn_until(service, lambda: state_of(service) == "ROLLED_BACK")
    assert trial_of(service).reason == "divergence 0.95 above 0.8"
    assert all(split.is_shadow for _, split in gateway.seen if split is not None)


def test_a_restart_goes_on_with_the_trial(make: Make, gateway: MemoryGateway) -> None:
    """The second stage and what it has counted stand in the database; the gateway may forget everything."""
    long = msgspec.structs.replace(QUICK, percentages=[10.0, 50.0, 90.0], soak_seconds=0.05)
    service = with_live(make, gateway, rollout=long)
    turn_busily(service, busy(gateway), lambda: trial_of(service).stage == 1)
    turn_until(service, lambda: gateway.shares["npc"].share == 0.5)
    before = trial_of(service)
    service = make(rollout=Rollout())  # what the configuration says now concerns later versions
    gateway.restart()
    gateway.shares, gateway.versions, gateway.life = {}, {}, "second"
    turn_until(service, lambda: "npc" in gateway.shares)
    assert trial_of(service).id == before.id and gateway.shares["npc"].share == 0.5
    assert set(gateway.adapters) >= {"npc@0001", "npc@0002"}
    turn_busily(service, busy(gateway), lambda: state_of(service) == "LIVE")
    assert events(service).count("rollout.promoted") == 1


def test_no_other_update_begins_and_nothing_is_removed_meanwhile(make: Make, gateway: MemoryGateway) -> None:
    """What waits keeps waiting, and versions on trial keep their files whatever the engine lists."""
    slow = msgspec.structs.replace(QUICK, soak_seconds=60.0)
    service = with_live(make, gateway, rollout=slow, versions_kept=1)
    drop(service, range(20, 30))
    turn_busily(service, busy(gateway), lambda: trial_of(service).judgement is not None)
    assert len(runs.recent(service.house.database, "npc")) == 2
    gateway.adapters.clear()
    assert order(service, "gc").ok
    assert sorted(path.name for path in (service.house.versions / "npc").iterdir()) == ["0001", "0002"]


def test_an_operator_holds_promotes_and_rolls_back(make: Make, gateway: MemoryGateway) -> None:
    """A share by hand stays; the end is the operator's; the audit log says whose."""
    service = with_live(make, gateway)
    assert "give a share" in order(service, "canary").text
    assert "2 of npc is on trial, not 1" in order(service, "promote", version=1).text
    assert order(service, "canary", percent=33.0).detail == {"version": 2, "percent": 33.0}
    turn_until(service, lambda: gateway.shares["npc"].share == 0.33)
    turn_busily(service, busy(gateway), lambda: (j := trial_of(service).judgement) and j.outcome == "pass")
    for _ in range(10):
        service.tick(time.time())
    assert state_of(service) == "CANARY"
    assert order(service, "promote", version=2).ok and state_of(service) == "LIVE"
    assert gateway.table == {"npc": "npc@0002"} and gateway.shares == {}
    assert "nothing of npc is on trial" in order(service, "promote").text
    actors = {entry.actor for entry in audit.entries(service.house.database, 9) if entry.event == "rollout.promoted"}
    assert actors == {"uid:0"}


def test_a_rollback_ends_a_trial_and_a_trial_by_hand_brings_it_back(make: Make, gateway: MemoryGateway) -> None:
    """Without a number it means what is on trial; the version may be tried again, and promoted then."""
    service = with_live(make, gateway)
    assert order(service, "rollback").detail == {"version": 1}
    turn_until(service, lambda: gateway.shares == {})
    assert state_of(service) == "ROLLED_BACK"
    assert order(service, "canary", percent=20.0).detail == {"version": 2, "percent": 20.0}
    assert gateway.shares["npc"] == Split(candidate="npc@0002", share=0.2)
    assert order(service, "canary", version=1, percent=20.0).text.endswith("on trial, not 1: nothing is changed")


def test_a_trial_by_hand_of_a_version_that_was_rolled_back(make: Make, gateway: MemoryGateway) -> None:
    """Its run is at its end and stays so until it is promoted; bad numbers end the trial by themselves."""
    service = with_live(make, gateway)
    assert order(service, "rollback").ok
    assert "answers all requests" in order(service, "canary", version=1, percent=20.0).text
    assert order(service, "canary", version=2, percent=20.0).ok
    service = make()
    turn_busily(service, busy(gateway, answered=0, failed=30), lambda: trial_of(service).outcome == "rolled_back")
    turn_until(service, lambda: gateway.shares == {})
    assert order(service, "canary", percent=20.0).ok and order(service, "promote").ok
    assert gateway.table == {"npc": "npc@0002"} and state_of(service) == "LIVE"


def test_a_run_that_is_cancelled_on_trial_loses_its_share(make: Make, gateway: MemoryGateway) -> None:
    """Its examples wait without a mark against them."""
    service = with_live(make, gateway)
    assert order(service, "cancel", run_id="npc-00002").ok
    turn_until(service, lambda: gateway.shares == {})
    assert runs.get(service.house.database, "npc-00002").state == "CANCELLED"
    assert trial_of(service).outcome == "cancelled"
    failures = service.house.database.execute("SELECT max(failures) FROM example").fetchone()[0]
    assert failures == 0
