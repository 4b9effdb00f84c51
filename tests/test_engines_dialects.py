"""One contract for all engines, each against a fake that speaks its dialect; and the GGUF conversion in numbers."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_dialects import (
    FakeLlamaScales,
    FakeLlamaServer,
    FakeLorax,
    FakeMistral,
    FakeSglang,
    FakeVllm,
    FakeVllmShaped,
)
from fake_engine import FakeEngine, canary
from serving_kit import make_adapter, served

from daemon.config import ConfigError
from daemon.config import Engine as Settings
from daemon.engines.activate import activate, prove
from daemon.engines.build import build
from daemon.engines.contract import Engine, EngineRefused, EngineUnavailable, ProbeFailed, Version
from daemon.engines.gguf_adapter import BaseShape, convert
from daemon.engines.reconcile import Desired, reconcile
from strategies.request import Canary


class Place(NamedTuple):
    """An engine's client, the fakes behind it and the versions that it may serve."""

    engine: Engine
    fakes: list[FakeEngine]
    versions: list[Version]
    settings: Settings


@pytest.fixture(scope="module")
def versions(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    """Two real adapters of the tiny model."""
    root = tmp_path_factory.mktemp("versions")
    return [
        Version(model="npc", number=number, path=make_adapter(tiny_base, root / f"{number:04d}", seed=number))
        for number in (1, 2)
    ]


def write_base_gguf(path: Path) -> None:
    """The header of the tiny model as GGUF."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


KINDS = ["embedded", "vllm", "vllm_shaped", "sglang", "lorax", "mistral", "llama_server", "llama_scales"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, versions: list[Version], tmp_path: Path) -> Iterator[Place]:
    """Each kind of engine, built from its configuration; vLLM with two replicas."""
    kind = request.param
    preset = tmp_path / "models.ini"
    fakes: dict[str, list[FakeEngine]] = {
        "embedded": [FakeEngine()],
        "vllm": [FakeVllm(), FakeVllm()],
        "sglang": [FakeSglang()],
        "lorax": [FakeLorax()],
        "mistral": [FakeMistral()],
        "vllm_shaped": [FakeVllmShaped(), FakeVllmShaped()],
        "llama_server": [FakeLlamaServer(preset)],
        "llama_scales": [FakeLlamaScales(tmp_path)],
    }
    write_base_gguf(tmp_path / "base.gguf")
    preset.write_text(f"version = 1\n\n[base]\nmodel = {tmp_path / 'base.gguf'}\nctx-size = 512\n")
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(served(fake)) for fake in fakes[kind]]
        if kind == "llama_server":
            urls = [f"{urls[0]}?preset={preset}"]
        if kind == "llama_scales":
            urls = [f"{urls[0]}?slots={tmp_path}&base={tmp_path / 'base.gguf'}"]
        configured = "llama_server" if kind == "llama_scales" else kind
        settings = Settings(kind=configured, urls=urls, timeout_seconds=5.0)
        engine = build(settings)
        assert engine.health().ok
        stack.callback(engine.close)
        yield Place(engine, fakes[kind], versions, settings)


def canaries(place: Place, version: Version) -> list[Canary]:
    """Two canaries; the fakes that only chat are told what the greedy answers are."""
    found = [canary(version.path, seed) for seed in range(2)]
    found = [
        Canary(**{f: getattr(c, f) for f in c.__struct_fields__} | {"prompt": f"q{at}"}) for at, c in enumerate(found)
    ]
    for fake in place.fakes:
        if isinstance(fake, (FakeLorax, FakeMistral, FakeVllmShaped)):
            fake.answers = {each.prompt: each.token_ids for each in found}
    return found


def test_versions_go_live_one_after_the_other(place: Place) -> None:
    """Load, proof, alias; the previous one stays loaded; again is no error; unloading twice neither."""
    for at, version in enumerate(place.versions):
        done = activate(place.engine, "npc", version, canaries(place, version))
        assert done.match.to_reference == 0
        assert done.previous == (place.versions[0].name if at else None)
        activate(place.engine, "npc", version, canaries(place, version))
    assert place.engine.aliases() == {"npc": "npc@0002"}
    assert [row.name for row in place.engine.loaded()] == ["npc@0001", "npc@0002"]
    assert {row.root for row in place.engine.loaded()} == {str(version.path) for version in place.versions}
    for _ in range(2):
        place.engine.unload("npc@0001")
    assert [row.name for row in place.engine.loaded()] == ["npc@0002"]


@pytest.mark.parametrize("trouble", ["lies", "confuses"])
def test_a_wrong_answer_stops_the_swap(place: Place, trouble: str) -> None:
    """The base's or another adapter's answers: the old version stays, the new one is unloaded."""
    activate(place.engine, "npc", place.versions[0], canaries(place, place.versions[0]))
    setattr(place.fakes[-1], trouble, "other weights")
    with pytest.raises(ProbeFailed):
        activate(place.engine, "npc", place.versions[1], canaries(place, place.versions[1]))
    assert place.engine.aliases() == {"npc": "npc@0001"}
    assert [row.name for row in place.engine.loaded()] == ["npc@0001"]


def test_missing_files_are_refused(place: Place) -> None:
    """Final, and nothing changes."""
    gone = Version(model="npc", number=9, path=Path("/nowhere"))
    with pytest.raises(EngineRefused):
        activate(place.engine, "npc", gone, [canary(gone.path)])
    assert place.engine.aliases() == {} and place.engine.loaded() == []


def test_one_name_is_one_adapter(place: Place) -> None:
    """The same name from another path is refused."""
    place.engine.load(place.versions[0])
    with pytest.raises(EngineRefused):
        place.engine.load(Version(model="npc", number=1, path=place.versions[1].path))


def test_after_a_restart_it_is_served_again(place: Place) -> None:
    """Whatever the engine has forgotten: loaded, proven and pointed to again."""
    wish = Desired(alias="npc", version=place.versions[0], canaries=canaries(place, place.versions[0]))
    epoch = reconcile(place.engine, [wish]).epoch
    assert reconcile(place.engine, [wish], epoch).activations == []
    for fake in place.fakes:
        fake.restart()
    done = reconcile(place.engine, [wish], epoch)
    assert not done.errors
    assert place.engine.aliases() == {"npc": "npc@0001"}
    place.engine.probe("npc@0001", canaries(place, place.versions[0]))


EVERY_PATH = ("/health", "/v1/models", "/models", "/generate", "/v1/lora_adapters", "/lora-adapters")


def test_a_dead_engine_is_unavailable(place: Place) -> None:
    """503 on everything: worth another try, and health says why."""
    for fake in place.fakes:
        fake.failures = {path: [503] * 9 for path in EVERY_PATH}
    assert not place.engine.health().ok
    with pytest.raises(EngineUnavailable):
        place.engine.load(place.versions[0])


LOADS = ("/v1/load_lora_adapter", "/load_lora_adapter", "/models/load", "/generate", "/lora-adapters")


def test_a_load_that_fails_leaves_the_old_version(place: Place) -> None:
    """500 to a load: the alias stays; it is final where the engine means it so, else the next try ends well."""
    activate(place.engine, "npc", place.versions[0], canaries(place, place.versions[0]))
    place.fakes[-1].failures = {path: [500] for path in LOADS}
    with pytest.raises((EngineUnavailable, EngineRefused)) as caught:
        activate(place.engine, "npc", place.versions[1], canaries(place, place.versions[1]))
    assert isinstance(caught.value, EngineRefused) == isinstance(place.fakes[0], FakeVllm)
    place.fakes[-1].failures = {}
    assert place.engine.aliases() == {"npc": "npc@0001"}
    activate(place.engine, "npc", place.versions[1], canaries(place, place.versions[1]))
    assert place.engine.aliases() == {"npc": "npc@0002"}


def test_a_slow_engine_is_waited_for_and_one_that_hangs_is_unavailable(place: Place) -> None:
    """Slower than ever, but within `timeout_seconds`: the swap goes on; beyond that it is worth another try."""
    place.fakes[-1].delay_seconds = 0.02
    activate(place.engine, "npc", place.versions[0], canaries(place, place.versions[0]))
    hasty = build(msgspec.structs.replace(place.settings, timeout_seconds=0.2))
    place.fakes[-1].delay_seconds = 0.5
    assert not hasty.health().ok
    with pytest.raises(EngineUnavailable):
        activate(hasty, "npc", place.versions[1], canaries(place, place.versions[1]))
    place.fakes[-1].delay_seconds = 0.0
    assert place.engine.aliases() == {"npc": "npc@0001"}
    hasty.close()


def test_what_the_engine_has_forgotten_is_loaded_again(place: Place) -> None:
    """One version gone from a process that goes on: no new epoch, and yet the next look finds and mends it."""
    live, previous = place.versions
    wish = Desired(alias="npc", version=live, canaries=canaries(place, live), previous=previous)
    epoch = reconcile(place.engine, [wish]).epoch
    reconcile(place.engine, [wish], epoch)
    place.fakes[-1].forget(live.name)
    done = reconcile(place.engine, [wish], epoch)
    assert not done.errors and done.epoch == epoch
    assert {row.name for row in place.engine.loaded()} == {"npc@0001", "npc@0002"}
    assert prove(place.engine, live.name, canaries(place, live)).to_reference == 0


def test_a_moved_alias_is_not_overwritten(place: Place) -> None:
    """Compare-and-swap, whoever keeps the table."""
    place.engine.load(place.versions[0])
    place.engine.route("npc", "npc@0001", None)
    with pytest.raises(EngineUnavailable):
        place.engine.route("npc", place.engine.capabilities().base, None)


@pytest.fixture
def replicas() -> Iterator[tuple[Engine, list[FakeVllm]]]:
    """vLLM twice."""
    fakes = [FakeVllm(), FakeVllm()]
    with served(fakes[0]) as first, served(fakes[1]) as second:
        engine = build(Settings(kind="vllm", urls=[first, second]))
        yield engine, fakes
        engine.close()


def test_a_replica_that_lacks_a_version_gets_it(
    replicas: tuple[Engine, list[FakeVllm]], versions: list[Version]
) -> None:
    """One replica restarted: what is loaded in part is loaded where it lacks, and only there."""
    engine, fakes = replicas
    wish = Desired(alias="npc", version=versions[0], canaries=[canary(versions[0].path)])
    reconcile(engine, [wish])
    fakes[1].restart()
    assert [row.state for row in engine.loaded()] == ["partial"]
    assert len(reconcile(engine, [wish]).activations) == 1
    assert [row.state for row in engine.loaded()] == ["loaded"]
    assert fakes[0].seen.count("POST /v1/load_lora_adapter") == 1


def test_a_restart_of_one_replica_is_another_epoch(replicas: tuple[Engine, list[FakeVllm]]) -> None:
    """vLLM says when its process started; where metrics are off it is what is missing in the list that counts."""
    engine, fakes = replicas
    before = engine.health().epoch
    assert engine.health().epoch == before != ""
    fakes[1].restart()
    assert engine.health().epoch not in (before, "")
    for fake in fakes:
        fake.failures = {"/metrics": [404]}
    assert engine.health().ok


def test_what_one_replica_refuses_no_replica_keeps(
    replicas: tuple[Engine, list[FakeVllm]], versions: list[Version], tmp_path: Path
) -> None:
    """vLLM's 500 for a torn file is final, and the replica that took it gives it back."""
    engine, fakes = replicas
    (tmp_path / "torn").touch()
    with pytest.raises(EngineRefused, match="Error loading lora"):
        engine.load(Version(model="npc", number=1, path=tmp_path))
    fakes[1].failures["/v1/load_lora_adapter"] = [500]
    with pytest.raises(EngineRefused):
        engine.load(versions[0])
    assert fakes[0].adapters == {} and engine.loaded() == []


def test_mistral_says_its_slots_leases_and_generations(versions: list[Version], tmp_path: Path) -> None:
    """From its listing, with or without paths; unfit files are final, a load in progress is waited for."""
    fake = FakeMistral()
    fake.slots = 5
    with served(fake) as url:
        engine = build(Settings(kind="mistral", urls=[url], timeout_seconds=5.0))
        fake.failures = {"/v1/load_lora_adapter": [429, 429]}
        generation = engine.load(versions[0]).generation
        assert engine.capabilities().slots == 5
        assert [(row.leases, row.generation, row.root) for row in engine.loaded()] == [
            (2, generation, str(versions[0].path))
        ]
        fake.hides_paths = True
        assert engine.load(versions[0]).generation == generation and engine.loaded()[0].root == ""
        (tmp_path / "torn").touch()
        with pytest.raises(EngineRefused, match="invalid LoRA adapter"):
            engine.load(Version(model="npc", number=3, path=tmp_path))
        engine.close()


def test_a_server_of_vllm_s_shape_may_list_bare_names(versions: list[Version]) -> None:
    """What has a version's name is an adapter; the base is what is left; nothing to prove with is final."""
    fake = FakeVllmShaped()
    fake.hides_paths = True
    with served(fake) as url:
        engine = build(Settings(kind="vllm_shaped", urls=[url], timeout_seconds=5.0))
        engine.load(versions[0])
        engine.load(versions[0])
        assert engine.capabilities().base == "base"
        assert [(row.name, row.root, row.state) for row in engine.loaded()] == [("npc@0001", "", "loaded")]
        fake.answers = {"who are you?": []}
        with pytest.raises(ProbeFailed, match="inf from the candidate"):
            activate(engine, "npc", versions[0], [canary(versions[0].path)])
        engine.close()


@pytest.mark.parametrize("kind", ["vllm", "vllm_shaped", "sglang", "lorax", "directory"])
def test_slots_are_configured_where_the_engine_does_not_say(kind: str, tmp_path: Path) -> None:
    """Three for each model that it serves."""
    with served(FakeSglang() if kind == "sglang" else FakeVllm()) as url:
        engine = build(Settings(kind=kind, urls=[f"file:{tmp_path}" if kind == "directory" else url], slots=6))
        assert engine.capabilities().slots == 6
        engine.close()


def test_a_directory_gets_whole_versions(versions: list[Version], tmp_path: Path) -> None:
    """Published unproven, aliases in a file that survives the daemon, the oldest removed."""
    engine = build(Settings(kind="directory", urls=[f"file:{tmp_path}"]))
    for version in versions:
        assert activate(engine, "npc", version, []).match is None
    assert (tmp_path / "npc@0002" / "adapter_model.safetensors").is_file()
    again = build(Settings(kind="directory", urls=[str(tmp_path)]))
    assert again.aliases() == {"npc": "npc@0002"}
    again.unload("npc@0001")
    again.unload("npc@0001")
    assert [row.name for row in again.loaded()] == ["npc@0002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aliases.json", "npc@0002"]
    with pytest.raises(EngineRefused):
        again.load(Version(model="npc", number=9, path=Path("/nowhere")))
    assert again.health().ok and not build(Settings(kind="directory", urls=["/nowhere"])).health().ok


def test_a_configuration_without_its_needs_is_refused() -> None:
    """No url, or llama-server without its preset file."""
    with pytest.raises(ConfigError, match="needs `urls`"):
        build(Settings(kind="vllm"))
    with pytest.raises(ConfigError, match="preset"):
        build(Settings(kind="llama_server", urls=["http://127.0.0.1:8080"]))


def test_gguf_adapters_compute_what_peft_computes(tiny_base: Path, tmp_path: Path) -> None:
    """B A in the file is PEFT's scaled update; q and k in llama.cpp's order of rows, everything else as it was.

    The order is derived here from what rotary embedding needs: row 2i and 2i + 1 of a head are its i-th halves.
    """
    import numpy as np
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    adapter = make_adapter(
        tiny_base, tmp_path / "a", seed=1, rank=4, alpha=6.0, alpha_pattern={"layers.1.mlp.up_proj": 2}
    )
    convert(adapter, BaseShape("llama", 2, 4, 2), tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    peft = load_file(adapter / "adapter_model.safetensors")
    assert len(found) == len(peft) == 2 * 7 * 2
    assert reader.fields["general.type"].contents() == "adapter"
    places = {"self_attn.q_proj": ("attn_q", 4), "self_attn.k_proj": ("attn_k", 2), "self_attn.v_proj": ("attn_v", 0),
              "self_attn.o_proj": ("attn_output", 0), "mlp.gate_proj": ("ffn_gate", 0), "mlp.up_proj": ("ffn_up", 0),
              "mlp.down_proj": ("ffn_down", 0)}  # fmt: skip
    for module, (name, heads) in places.items():
        for layer in range(2):
            key = f"base_model.model.model.layers.{layer}.{module}"
            scale = 0.5 if (layer, module) == (1, "mlp.up_proj") else 1.5
            update = scale * peft[f"{key}.lora_B.weight"] @ peft[f"{key}.lora_A.weight"]
            gguf = found[f"blk.{layer}.{name}.weight.lora_b"] @ found[f"blk.{layer}.{name}.weight.lora_a"]
            if heads:
                size = update.shape[0] // heads
                order = [
                    h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)
                ]
                update = update[order]
            np.testing.assert_allclose(gguf, update, atol=1e-5)


def test_bfloat16_adapters_are_converted(tiny_base: Path, tmp_path: Path) -> None:
    """numpy has no bfloat16; the file is read all the same."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tiny_base, tmp_path / "a", seed=1)
    file = adapter / "adapter_model.safetensors"
    half = {key: tensor.bfloat16() for key, tensor in load_file(file).items()}
    save_file(half, file)
    convert(adapter, BaseShape("llama", 2, 4, 2), tmp_path / "a.gguf")
    found = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    expected = half["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].float()
    assert torch.equal(torch.tensor(found["blk.0.ffn_up.weight.lora_a"]), expected)


def test_llama_server_refuses_what_it_has_no_place_for(tiny_base: Path, tmp_path: Path) -> None:
    """A module that the architecture does not know is an error before anything is written to the preset file."""
    adapter = make_adapter(tiny_base, tmp_path / "a", seed=1)
    with pytest.raises(ValueError, match=re.escape("layers.1")):
        convert(adapter, BaseShape("llama", 1, 4, 2), tmp_path / "a.gguf")
