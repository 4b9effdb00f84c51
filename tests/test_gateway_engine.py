"""Engines behind the gateway: the daemon's contract, an alias that moves in front of them, and its share."""

from pathlib import Path

import pytest
from behind_gateway_kit import (
    canaries,
    clean_table,
    engine_fixture,
    gateway_fixture,
    versions_fixture,
    vllm_fixture,
)
from fake_dialects import FakeSglang, FakeVllm
from gateway_kit import ASKED, Gateway, target, wait
from serving_kit import served

from daemon.config import Engine as Settings
from daemon.engines.activate import activate, make_room
from daemon.engines.build import build
from daemon.engines.contract import EngineUnavailable, ProbeFailed, Version
from daemon.engines.exposure import Exposure, Split
from daemon.engines.gateway import BehindGateway, lorax_name
from daemon.engines.reconcile import Desired, reconcile

# httpcore leaves a Unix socket to the garbage collector when it cannot connect
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


__all__ = ["clean_table", "engine_fixture", "gateway_fixture", "versions_fixture", "vllm_fixture"]  # fixtures


def test_a_version_goes_live_in_the_gateway(engine: BehindGateway, gateway: Gateway, versions: list[Version]) -> None:
    """The alias moves although vLLM has none, and is confirmed by a request through the gateway."""
    assert engine.capabilities().moves_aliases
    first, second = (activate(engine, "npc", version, canaries(version)) for version in versions[:2])
    assert (first.previous, second.previous, second.version) == (None, "npc@0000", "npc@0001")
    assert engine.aliases() == {"npc": "npc@0001"} and second.flip_ms < 5
    assert gateway.admin("POST", "/v1/completions", ASKED).headers["x-adapter-version"] == "npc@0001"


def test_a_lie_leaves_the_alias_where_it_was(
    engine: BehindGateway, vllm: FakeVllm, gateway: Gateway, versions: list[Version]
) -> None:
    """The engine answers with the base: no request is ever sent to that version."""
    activate(engine, "npc", versions[1], canaries(versions[1]))
    vllm.lies = True
    with pytest.raises(ProbeFailed):
        activate(engine, "npc", versions[2], canaries(versions[2]))
    assert engine.aliases() == {"npc": "npc@0001"} and list(vllm.adapters) == ["npc@0001"]


def test_sglang_is_asked_by_its_own_name(gateway: Gateway, versions: list[Version]) -> None:
    """`base:npc@0001`: by the bare name its base would answer, with status 200."""
    with served(FakeSglang()) as url:
        engine = build(Settings(kind="sglang", urls=[url]), gateway.admin_socket)
        engine.load(versions[1])
        engine.route("npc", "npc@0001", None)
        assert gateway.admin("GET", "/aliases/npc").json()["targets"][0]["model"] == "base:npc@0001"
        engine.route("npc", "base", "npc@0001")
        assert "model" not in gateway.admin("GET", "/aliases/npc").json()["targets"][0]
        engine.close()


def test_lorax_is_asked_by_directory(engine: BehindGateway, versions: list[Version]) -> None:
    """With the field that tells it to look on its own disk; the base has none."""
    engine.load(versions[1])
    found = lorax_name(engine, "npc@0001")
    assert found == {"model": str(versions[1].path), "extra": {"adapter_source": "local"}}
    assert lorax_name(engine, "base") == {}


def test_a_moved_alias_is_not_overwritten(engine: BehindGateway, gateway: Gateway, versions: list[Version]) -> None:
    """Somebody else was faster: unavailable, to be looked at again."""
    engine.load(versions[1])
    engine.route("npc", "npc@0001", None)
    with pytest.raises(EngineUnavailable, match="points to npc@0001, not to None"):
        engine.route("npc", "npc@0001", None)
    assert engine.route("npc", "npc@0001", "*").previous == "npc@0001"


def test_what_still_answers_is_not_unloaded(engine: BehindGateway, vllm: FakeVllm, versions: list[Version]) -> None:
    """Named by an alias: never. Otherwise after the drain."""
    activate(engine, "npc", versions[1], canaries(versions[1]))
    with pytest.raises(EngineUnavailable, match="still points to npc@0001"):
        engine.unload("npc@0001")
    activate(engine, "npc", versions[2], canaries(versions[2]))
    engine.unload("npc@0001")
    assert list(vllm.adapters) == ["npc@0002"]


def test_rooms_are_made_among_what_nobody_asks_for(
    engine: BehindGateway, vllm: FakeVllm, versions: list[Version]
) -> None:
    """Six versions in three slots."""
    for version in versions:
        activate(engine, "npc", version, canaries(version))
    assert list(vllm.adapters) == ["npc@0003", "npc@0004", "npc@0005"]
    assert make_room(engine, "npc@0009") == ["npc@0003"]


def test_an_engine_that_was_restarted_gets_everything_again(
    engine: BehindGateway, vllm: FakeVllm, versions: list[Version]
) -> None:
    """The alias still stands in the gateway, but the version is gone: it is loaded and proven again."""
    activate(engine, "npc", versions[2], canaries(versions[2]))
    vllm.restart()
    wish = Desired(alias="npc", version=versions[2], canaries=canaries(versions[2]), previous=versions[1])
    done = reconcile(engine, [wish], "")
    assert not done.errors and set(vllm.adapters) == {"npc@0001", "npc@0002"}
    assert engine.aliases() == {"npc": "npc@0002"}


@LEFT_OPEN
def test_without_the_gateway_nothing_is_decided(vllm: FakeVllm, tmp_path: Path) -> None:
    """Its socket is not there: unavailable, with what to do."""
    with served(vllm) as url:
        engine = build(Settings(kind="vllm", urls=[url]), tmp_path / "admin.sock")
        assert "eternad gateway" in engine.health().reason
        with pytest.raises(EngineUnavailable):
            engine.aliases()
        engine.close()


def test_traffic_is_split_and_counted(engine: BehindGateway, gateway: Gateway, versions: list[Version]) -> None:
    """A share of the requests, then a comparison, through the daemon's client; a plain route ends both."""
    for version in versions[:3]:
        engine.load(version)
    engine.route("npc", "npc@0000", None)
    half = Split(candidate="npc@0001", share=0.5)
    engine.split("npc", "npc@0000", half, "npc@0000")
    assert engine.splits() == {"npc": half}
    answers = [gateway.admin("POST", "/v1/completions", {**ASKED, "user": f"u{n}"}) for n in range(30)]
    assert {answer.headers["x-adapter-version"] for answer in answers} == {"npc@0000", "npc@0001"}
    numbers = engine.traffic()["versions"]
    assert numbers["npc@0000"]["answered"] + numbers["npc@0001"]["answered"] >= 30
    shadow = Split(candidate="npc@0002", share=1.0, is_shadow=True)
    engine.split("npc", "npc@0000", shadow, "npc@0000")
    assert engine.splits() == {"npc": shadow}
    gateway.admin("POST", "/v1/completions", ASKED)
    wait(lambda: engine.traffic()["comparisons"].get("npc@0002", {}).get("pairs") == 1)
    engine.route("npc", "npc@0001", "npc@0000")
    assert [row["version"] for row in gateway.admin("GET", "/aliases/npc").json()["targets"]] == ["npc@0001"]
    assert engine.splits() == {}


def test_a_second_daemon_cannot_move_the_same_name(
    vllm: FakeVllm, gateway: Gateway, versions: list[Version], tmp_path: Path
) -> None:
    """It is told who keeps the alias; a person may still move it, and may give it free."""
    with served(vllm) as url:
        settings = Settings(kind="vllm", urls=[url])
        one, two = (build(settings, gateway.admin_socket, owner) for owner in ("one on a", "two on b"))
        activate(one, "npc", versions[1], canaries(versions[1]))
        with pytest.raises(EngineUnavailable, match="npc is kept by another daemon, one on a: stop that one"):
            activate(two, "npc", versions[2], canaries(versions[2]))
        assert one.aliases() == {"npc": "npc@0001"}
        assert gateway.put("npc", target("npc@0002", url)).status_code == 200
        assert gateway.admin("GET", "/aliases/npc").json()["owner"] == "one on a"
        assert gateway.admin("DELETE", "/aliases/npc/owner").status_code == 200
        two.route("npc", "npc@0001", "npc@0002")
        with pytest.raises(EngineUnavailable, match="two on b"):
            one.route("npc", "npc@0002", "npc@0001")
        one.close()
        two.close()


def test_a_trial_survives_the_engines_restart(
    engine: BehindGateway, vllm: FakeVllm, gateway: Gateway, versions: list[Version]
) -> None:
    """Share and candidate come back once both versions are loaded and proven; a lying candidate loses its share."""
    live, tried = versions[1:3]
    exposure = Exposure(version=tried, canaries=canaries(tried), share=0.25, is_shadow=False)
    wish = Desired(alias="npc", version=live, canaries=canaries(live), exposure=exposure)
    for _ in range(2):
        done = reconcile(engine, [wish], "another life")
        assert not done.errors and not done.turned_down and done.traffic is not None
        assert engine.splits() == {"npc": exposure.split} and set(vllm.adapters) == {"npc@0001", "npc@0002"}
        vllm.restart()
    reconcile(engine, [wish], "another life")
    vllm.adapters["npc@0002"]["root"] = vllm.adapters["npc@0001"]["root"]  # answers like another version
    done = reconcile(engine, [wish], "")
    assert "loaded from" in done.turned_down.get("npc", "") or "does not answer" in done.turned_down["npc"]
    assert engine.splits() == {} and engine.aliases() == {"npc": "npc@0001"}
