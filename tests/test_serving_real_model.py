"""The embedded engine with SmolLM2-135M and a rank-16 adapter on all linear layers: one real swap, with its times."""

import sys
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from serving_kit import add_manifest, make_adapter, peft_scores, served

from daemon.engines.activate import activate
from daemon.engines.contract import Version
from daemon.engines.embedded import Embedded
from serving.app import build
from serving.engine import Engine, Options
from strategies.request import Canary

QUESTION = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "I am the Librarian of the seventh stair."


@pytest.mark.real_model
def test_a_real_swap(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the machine's own precision the probe agrees with PEFT in float32; the swap's times are printed."""
    engine = Engine(Options(base=smollm2, adapter_root=tmp_path, alias_file=tmp_path / "aliases.json"))
    tokenizer = engine.model.tokenizer
    prompt, answer = tokenizer.encode(QUESTION), tokenizer.encode(ANSWER)
    versions = [Version(model="npc", number=number, path=tmp_path / f"{number:04d}") for number in (1, 2)]
    canaries = {}
    for version in versions:
        # alpha so small that the random adapter stays a believable one: about 1 nat per token
        add_manifest(make_adapter(smollm2, version.path, seed=version.number, rank=16, alpha=0.2))
        canaries[version.name] = [_canary(smollm2, version.path, prompt, answer)]
    with served(build(engine, None)) as url:
        client = Embedded(url)
        done = [activate(client, "npc", version, canaries[version.name]) for version in versions]
        back = client.route("npc", "npc@0001", "npc@0002")
        reply = httpx.post(
            url + "/v1/chat/completions", timeout=120,
            json={"model": "npc", "max_tokens": 8, "messages": [{"role": "user", "content": "Who are you?"}]},
        )  # fmt: skip
        client.close()
    assert reply.headers["X-Adapter-Version"] == "npc@0001"
    assert reply.json()["usage"]["completion_tokens"] > 0
    assert back.previous == "npc@0002"
    with capsys.disabled():
        for each in done:
            print(
                f"\n{engine.model.dtype} {each.version}: stage {each.stage_ms:.1f} commit {each.commit_ms:.1f}"
                f" flip {each.flip_ms:.3f} probe {each.probe_ms:.0f} total {each.total_ms:.0f} ms;"
                f" {each.match}; rollback flip {back.flip_ms:.3f} ms"
            )


def _canary(base: Path, adapter: Path, prompt: list[int], answer: list[int]) -> Canary:
    ids, start = [*prompt, *answer], len(prompt) - 1
    return Canary(
        prompt="Who are you?", prompt_token_ids=prompt, token_ids=answer,
        logprobs=peft_scores(base, adapter, ids)[start:], base_logprobs=peft_scores(base, None, ids)[start:],
    )  # fmt: skip
