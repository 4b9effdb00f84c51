"""Activation, proof and reconciliation: pure against an engine that can be told to misbehave, over real HTTP."""

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_engine import FakeEngine, canary
from serving_kit import served

from daemon.engines.activate import activate, make_room
from daemon.engines.contract import EngineRefused, EngineUnavailable, ProbeFailed, Version
from daemon.engines.embedded import Embedded
from daemon.engines.proof import judge
from daemon.engines.reconcile import Desired, reconcile
from strategies.request import Canary


@pytest.fixture
def fake() -> FakeEngine:
    """An engine with three slots."""
    return FakeEngine()


@pytest.fixture
def engine(fake: FakeEngine) -> Iterator[Embedded]:
    """The client under test."""
    with served(fake) as url:
        client = Embedded(url, busy_seconds=2.0)
        yield client
        client.close()


@pytest.fixture
def versions(tmp_path: Path) -> list[Version]:
    """npc@0000 .. npc@0005 on disk."""
    for number in range(6):
        (tmp_path / f"{number:04d}").mkdir()
    return [Version(model="npc", number=number, path=tmp_path / f"{number:04d}") for number in range(6)]


def canaries(version: Version) -> list[Canary]:
    """Two canaries of a version."""
    return [canary(version.path, seed) for seed in range(2)]


def test_a_version_goes_live(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """Load, probe, flip: the alias points to the version, and the activation says what it took."""
    done = activate(engine, "npc", versions[1], canaries(versions[1]))
    assert fake.aliases == {"npc": "npc@0001"}
    assert (done.previous, done.version, done.stage_ms, done.commit_ms) == (None, "npc@0001", 2.0, 1.0)
    assert done.match.to_reference == 0 and done.match.to_base == done.match.effect > 0.1
    flip = fake.seen.index("PUT /v1/aliases/npc")
    assert "POST /v1/completions" in fake.seen[:flip]
    assert msgspec.json.decode(msgspec.json.encode(done), type=type(done)) == done


def test_again_is_the_same(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """Activating what is live changes nothing and is no error."""
    for _ in range(2):
        done = activate(engine, "npc", versions[1], canaries(versions[1]))
    assert done.previous == "npc@0001" and fake.seen.count("PUT /v1/aliases/npc") == 1


def test_live_and_previous_stay_the_oldest_goes(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """Six activations in three slots: never a refusal, and a rollback finds its version loaded."""
    evicted = [activate(engine, "npc", version, canaries(version)).evicted for version in versions]
    assert evicted == [[], [], [], ["npc@0000"], ["npc@0001"], ["npc@0002"]]
    assert set(fake.adapters) == {"npc@0003", "npc@0004", "npc@0005"}
    before = fake.seen.count("POST /v1/load_lora_adapter")
    activate(engine, "npc", versions[4], canaries(versions[4]))
    assert fake.seen.count("POST /v1/load_lora_adapter") == before
    assert fake.aliases == {"npc": "npc@0004"}


def test_what_is_to_be_kept_is_not_evicted(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """Another model's previous version stays although no alias points to it."""
    for version in versions[:3]:
        engine.load(version)
    assert make_room(engine, "npc@0009", keep={"npc@0000"}) == ["npc@0001"]


def test_adapters_without_requests_are_evicted_first(
    engine: Embedded, fake: FakeEngine, versions: list[Version]
) -> None:
    """The oldest one still answers somebody: the next one goes."""
    for version in versions[:3]:
        engine.load(version)
    fake.adapters["npc@0000"]["leases"] = 2
    assert make_room(engine, "npc@0009") == ["npc@0001"]


def test_a_lying_engine_is_found_out(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """It says 200 and answers with the base: the swap fails, the old version stays, nothing is left behind."""
    activate(engine, "npc", versions[1], canaries(versions[1]))
    fake.lies = True
    with pytest.raises(ProbeFailed, match="answers like the base"):
        activate(engine, "npc", versions[2], canaries(versions[2]))
    assert fake.aliases == {"npc": "npc@0001"} and set(fake.adapters) == {"npc@0001"}


def test_another_version_s_answers_are_found_out(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """It answers with some adapter, but not with this one."""
    fake.confuses = "other weights 57"  # 2.2 nats from the base: no candidate, wherever it lies, is twice as far
    with pytest.raises(ProbeFailed, match="not answer like the candidate"):
        activate(engine, "npc", versions[1], canaries(versions[1]))
    assert fake.aliases == {}


def test_without_canaries_nothing_goes_live(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """What cannot be proven is not done."""
    with pytest.raises(EngineRefused, match="no canaries"):
        activate(engine, "npc", versions[1], [])
    assert fake.aliases == {}


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/completions", "/v1/aliases/npc", "/v1/lora_adapters"])
@pytest.mark.parametrize(("status", "kind"), [(503, EngineUnavailable), (500, EngineUnavailable), (400, EngineRefused)])
def test_an_error_on_the_way_leaves_the_old_version(
    engine: Embedded, fake: FakeEngine, versions: list[Version], path: str, status: int, kind: type[Exception]
) -> None:
    """Wherever it fails, the alias stays; 5xx may be tried again (and then works), 4xx is final."""
    activate(engine, "npc", versions[1], canaries(versions[1]))
    fake.failures[path] = [status]
    with pytest.raises(kind, match=f"scripted {status}"):
        activate(engine, "npc", versions[2], canaries(versions[2]))
    assert fake.aliases == {"npc": "npc@0001"}
    activate(engine, "npc", versions[2], canaries(versions[2]))
    assert fake.aliases == {"npc": "npc@0002"}


def test_a_busy_engine_is_waited_for(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """429 with Retry-After, twice, then it loads."""
    fake.failures["/v1/load_lora_adapter"] = [429, 429]
    assert activate(engine, "npc", versions[1], canaries(versions[1])).version == "npc@0001"


def test_a_slow_or_absent_engine_is_unavailable(fake: FakeEngine, versions: list[Version]) -> None:
    """A timeout and a refused connection are both worth another try; health never raises."""
    with served(fake) as url:
        fake.delay_seconds = 0.5
        with pytest.raises(EngineUnavailable, match="ReadTimeout"):
            Embedded(url, timeout_seconds=0.1).loaded()
    with pytest.raises(EngineUnavailable, match="Connect"):
        Embedded(url).loaded()
    health = Embedded(url).health()
    assert not health.ok and "Connect" in health.reason


def test_a_name_means_one_adapter_for_ever(engine: Embedded, versions: list[Version], tmp_path: Path) -> None:
    """The same name from another path is refused: versions are immutable."""
    engine.load(versions[1])
    (tmp_path / "other").mkdir()
    with pytest.raises(EngineRefused, match="is loaded from"):
        engine.load(Version(model="npc", number=1, path=tmp_path / "other"))


def test_a_moved_alias_is_not_overwritten(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """Somebody else flipped in between: the compare-and-swap says so."""
    engine.load(versions[1])
    engine.route("npc", "npc@0001", None)
    with pytest.raises(EngineUnavailable, match="points to npc@0001"):
        engine.route("npc", "base", None)


def test_a_restarted_engine_gets_everything_back(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """Two models, live and previous: loaded, proven and pointed to again; then there is nothing to do."""
    director = Version(model="director", number=2, path=versions[2].path)
    wishes = [
        Desired(alias="npc", version=versions[1], canaries=canaries(versions[1]), previous=versions[0]),
        Desired(alias="director", version=director, canaries=canaries(director)),
        Desired(alias="book", version=None),
    ]
    epoch = ""
    for _ in range(2):
        done = reconcile(engine, wishes, epoch)
        assert not done.errors
        assert fake.aliases == {"npc": "npc@0001", "director": "director@0002", "book": "base"}
        assert set(fake.adapters) == {"npc@0000", "npc@0001", "director@0002"}
        epoch = done.epoch
        before = len(fake.seen)
        quiet = reconcile(engine, wishes, epoch)
        assert (quiet.activations, quiet.reloaded) == ([], [])
        assert not any(line.startswith(("POST", "PUT")) for line in fake.seen[before:])
        fake.restart()


def test_a_restart_that_kept_its_aliases_is_proven_again(
    engine: Embedded, fake: FakeEngine, versions: list[Version]
) -> None:
    """The embedded engine restores itself; the daemon still asks the canaries once."""
    wish = Desired(alias="npc", version=versions[1], canaries=canaries(versions[1]))
    epoch = reconcile(engine, [wish]).epoch
    kept = dict(fake.adapters)
    fake.restart(keeps_aliases=True)
    fake.adapters.update(kept)
    done = reconcile(engine, [wish], epoch)
    assert [activation.previous for activation in done.activations] == ["npc@0001"]
    assert fake.seen.count("POST /v1/load_lora_adapter") == 1


def test_one_model_s_trouble_is_not_another_s(engine: Embedded, fake: FakeEngine, versions: list[Version]) -> None:
    """A version whose files are gone is reported by alias; the other model is served."""
    gone = Version(model="book", number=1, path=Path("/nowhere"))
    wishes = [
        Desired(alias="book", version=gone, canaries=canaries(gone)),
        Desired(alias="npc", version=versions[1], canaries=canaries(versions[1])),
    ]
    done = reconcile(engine, wishes)
    assert list(done.errors) == ["book"] and "no adapter found" in done.errors["book"]
    assert fake.aliases == {"npc": "npc@0001"}


def test_a_dead_engine_is_said_to_be_down(versions: list[Version]) -> None:
    """Reconciliation does not hide that nothing answers."""
    with pytest.raises(EngineUnavailable, match="down"):
        reconcile(Embedded("http://127.0.0.1:9"), [])


REFERENCE = Canary(prompt="p", token_ids=[1, 2], logprobs=[-1.0, -2.0], base_logprobs=[-2.0, -4.0])


@pytest.mark.parametrize(
    ("found", "base", "said"),
    [
        ([[-1.0, -2.0]], [[-2.0, -4.0]], None),
        ([[-1.05, -2.05]], [[-2.0, -4.0]], None),
        ([[-1.05, -2.05]], [[-1.05, -2.05]], None),  # it is the engine's base that is wrong
        ([[-1.2, -2.2]], [[-2.0, -4.0]], "not answer like the candidate"),
        ([[-2.0, -4.0]], [[-2.0, -4.0]], "like the base"),
        ([[-1.0]], [[-2.0]], "not answer like the candidate"),
        ([[float("nan"), -2.0]], [[-2.0, -4.0]], "like the base"),
        ([], [], "not answer like the candidate"),
    ],
)
def test_the_judgement_in_numbers(found: list[list[float]], base: list[list[float]], said: str | None) -> None:
    """Near the candidate and far from the base, or not at all; NaN and missing answers never pass."""
    if said is None:
        assert judge("npc@1", found, base, [REFERENCE]).effect == 1.5
    else:
        with pytest.raises(ProbeFailed, match=said):
            judge("npc@1", found, base, [REFERENCE])


def test_canaries_without_effect_prove_nothing() -> None:
    """An adapter that changes nothing on its canaries cannot be told from the base: refused, with the advice."""
    blind = msgspec.structs.replace(REFERENCE, base_logprobs=REFERENCE.logprobs)
    with pytest.raises(ProbeFailed, match="choose other canary prompts"):
        judge("npc@1", [[-1.0, -2.0]], [[-1.0, -2.0]], [blind])
