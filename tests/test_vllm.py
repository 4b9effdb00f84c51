"""A real vLLM (CPU build, in a virtual environment of its own) behind the gateway: `make test-vllm`, some minutes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gateway_kit import Gateway, running
from serving_kit import ROOT, make_adapter

from daemon import retention
from daemon.config import Engine as Settings
from daemon.engines.activate import activate
from daemon.engines.build import build
from daemon.engines.contract import Engine, EngineRefused, Version
from daemon.engines.reconcile import Desired, reconcile
from daemon.state import runs
from strategies.request import Canary

VLLM = ROOT / ".cache" / "vllm" / "bin" / "vllm"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not VLLM.exists(), reason="no vLLM in .cache/vllm: run `make test-vllm`"),
]

VERSIONS, KEPT, PLAYERS = 20, 4, 4
START_SECONDS = 900
OPTIONS = ["--served-model-name", "base", "--enable-lora", "--max-loras", "3", "--max-cpu-loras", "4",
           "--max-lora-rank", "16", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager",
           "--dtype", "bfloat16", "--host", "127.0.0.1"]  # fmt: skip
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
               "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip


class VllmProcess:
    """`vllm serve` with its workers as one process group."""

    def __init__(self, base: Path, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        self._command = [str(VLLM), "serve", str(base), "--port", str(port), *OPTIONS]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers: minutes on a busy machine."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            assert self.process.poll() is None, self._log.read_text()[-3000:]
            time.sleep(2)
        raise TimeoutError(self.url)

    def kill(self) -> None:
        """SIGKILL for all of it."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture(scope="module")
def root(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`versions/npc` with 20 adapters of rank 16."""
    root = tmp_path_factory.mktemp("versions") / "npc"
    for number in range(1, VERSIONS + 1):
        make_adapter(smollm2, root / f"{number:04d}", seed=number, rank=16, alpha=0.2)
    return root


@pytest.fixture(scope="module")
def canaries(smollm2: Path, root: Path) -> dict[int, list[Canary]]:
    """What PEFT says in float32: {number: canaries}."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer.encode("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n")
    answer = tokenizer.encode("I am the Librarian of the seventh stair.")
    ids = torch.tensor([[*prompt, *answer]])

    def scores(model: torch.nn.Module) -> list[float]:
        with torch.no_grad():
            logits = torch.log_softmax(model(ids).logits[0], -1)
        return [logits[len(prompt) + at - 1, token].item() for at, token in enumerate(answer)]

    with warnings.catch_warnings(action="ignore"):
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        base, found = scores(model), {}
        adapted = PeftModel.from_pretrained(model, root / "0001", adapter_name="1")
        for number in range(1, VERSIONS + 1):
            if number > 1:
                adapted.load_adapter(root / f"{number:04d}", adapter_name=str(number))
            adapted.set_adapter(str(number))
            own = scores(adapted)
            found[number] = [
                Canary(prompt="?", prompt_token_ids=prompt, token_ids=answer, logprobs=own, base_logprobs=base)
            ]
    return found


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """What moves the alias."""
    with running(tmp_path_factory.mktemp("gateway")) as process:
        yield process


@pytest.fixture(scope="module")
def vllm(
    smollm2: Path, canaries: dict[int, list[Canary]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmProcess]:
    """One server for the module, started after the reference scores: both at once are much for a small machine."""
    process = VllmProcess(smollm2, tmp_path_factory.mktemp("vllm") / "vllm.log")
    started = time.monotonic()
    process.start()
    print(f"vLLM started in {time.monotonic() - started:.0f} s")
    yield process
    process.kill()


@pytest.fixture(scope="module")
def engine(vllm: VllmProcess, gateway: Gateway) -> Iterator[Engine]:
    """The daemon's client of both."""
    client = build(Settings(kind="vllm", urls=[vllm.url], timeout_seconds=120), gateway.admin_socket)
    yield client
    client.close()


def version(root: Path, number: int) -> Version:
    """`npc@0001` and so on."""
    return Version(model="npc", number=number, path=root / f"{number:04d}")


class Player(threading.Thread):
    """Streams from the gateway until told to stop."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._url = gateway.url + "/v1"
        self.answers: Counter[str] = Counter()
        self.faults: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        """No retries: one failed request would be one too many."""
        with openai.OpenAI(base_url=self._url, api_key="-", max_retries=0, timeout=120) as asks:
            while not self.stop.is_set():
                try:
                    self.ask(asks)
                except openai.OpenAIError as error:
                    self.faults.append(repr(error))

    def ask(self, asks: openai.OpenAI) -> None:
        """One streamed answer: whole, and of one version."""
        asked = {"model": "npc", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 16}
        with asks.chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}) as stream:
            chunks = list(stream)
            answered = stream.response.headers["x-adapter-version"]
        finish = chunks[-1].choices[0].finish_reason if chunks and chunks[-1].choices else None
        named = {chunk.model for chunk in chunks}
        if named != {answered} or finish != "length":
            self.faults.append(f"{answered}: {finish}, {named}")
        self.answers[answered] += 1


def row(number: int, state: str) -> runs.Version:
    """As the database has it."""
    return runs.Version(
        model="npc", number=number, run_id=f"npc-{number:05d}", parent=number - 1, state=state, manifest_sha256="",
        published_at=0.0, activated_at=None, activation=None,
    )  # fmt: skip


def sweep(engine: Engine, root: Path, live: int) -> list[int]:
    """What the daemon's retention removes while `live` is served; nothing that vLLM lists may be among it."""
    listing = engine.loaded()
    listed = [word for loaded in listing for word in (loaded.name, loaded.root)]
    rows = [row(number, "live" if number == live else "superseded") for number in range(1, live + 1)]
    removals = retention.old_versions(root, rows, KEPT, listed)
    assert not {str(removal.path) for removal in removals} & {loaded.root for loaded in listing}
    return [int(removal.path.name) for removal in removals if retention.remove(removal)]


def test_twenty_versions_under_load(
    engine: Engine, gateway: Gateway, vllm: VllmProcess, root: Path, canaries: dict[int, list[Canary]]
) -> None:
    """Streams through the gateway while 20 versions go live and old ones lose their files: none fails, none mixes."""
    activate(engine, "npc", version(root, 1), canaries[1])
    players, removed, milliseconds = [Player(gateway) for _ in range(PLAYERS)], [], []
    for player in players:
        player.start()
    try:
        for number in range(2, VERSIONS + 1):
            done = activate(engine, "npc", version(root, number), canaries[number])
            milliseconds.append(done.total_ms)
            removed += sweep(engine, root, number)
    finally:
        for player in players:
            player.stop.set()
        for player in players:
            player.join(300)
    answers = sum((player.answers for player in players), Counter())
    print(
        f"{answers.total()} streamed answers of {len(answers)} versions, a swap took"
        f" {sorted(milliseconds)[len(milliseconds) // 2]:.0f} ms (median), files removed: {removed}"
    )
    assert [fault for player in players for fault in player.faults] == []
    assert answers.total() >= VERSIONS and len(answers) >= VERSIONS // 2
    assert removed == list(range(1, VERSIONS - KEPT + 1))
    assert engine.health().ok and {loaded.state for loaded in engine.loaded()} == {"loaded"}


def test_what_it_cannot_serve_is_final(engine: Engine, smollm2: Path, root: Path) -> None:
    """A rank above `--max-lora-rank` and a torn file: permanent errors with vLLM's reason, and nothing is listed."""
    wide = make_adapter(smollm2, root / "0098", seed=98, rank=32)
    torn = make_adapter(smollm2, root / "0099", seed=99, rank=16) / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    before = [loaded.name for loaded in engine.loaded()]
    with pytest.raises(EngineRefused, match="LoRA rank 32 is greater"):
        engine.load(Version(model="npc", number=98, path=wide))
    with pytest.raises(EngineRefused, match="deserializing"):
        engine.load(version(root, 99))
    with pytest.raises(EngineRefused, match="No adapter found"):
        engine.load(Version(model="npc", number=97, path=root / "0097"))
    assert [loaded.name for loaded in engine.loaded()] == before and engine.health().ok


def test_a_killed_vllm_gets_everything_back(
    engine: Engine, gateway: Gateway, vllm: VllmProcess, root: Path, canaries: dict[int, list[Canary]]
) -> None:
    """SIGKILL: another epoch, nothing loaded; one reconciliation later live and previous are there, proven again."""
    live, before = VERSIONS, VERSIONS - 1
    wish = Desired(alias="npc", version=version(root, live), canaries=canaries[live], previous=version(root, before))
    epoch = reconcile(engine, [wish]).epoch
    assert epoch and reconcile(engine, [wish], epoch).activations == []
    vllm.kill()
    assert not engine.health().ok
    vllm.start()
    assert engine.loaded() == []
    done = reconcile(engine, [wish], epoch)
    assert done.epoch != epoch and not done.errors
    assert {loaded.name for loaded in engine.loaded()} == {f"npc@{live:04d}", f"npc@{before:04d}"}
    player = Player(gateway)
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="-", max_retries=0, timeout=120) as asks:
        player.ask(asks)
    assert player.faults == [] and set(player.answers) == {f"npc@{live:04d}"}
