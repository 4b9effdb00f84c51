"""The embedded engine's HTTP routes, on the tiny model, with a real server and the real `openai` client."""

import json
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from serving_kit import add_manifest, make_adapter, peft_scores, served

from serving.app import build
from serving.engine import Engine, Options


@pytest.fixture(scope="module")
def root(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter root with two good versions and several bad ones."""
    import torch
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("versions")
    for number in (1, 2):
        add_manifest(make_adapter(tiny_base, root / f"v{number}", seed=number))
    make_adapter(tiny_base, root / "rank32", seed=3, rank=32)
    for name in ("torn", "nan", "foreign", "odd", "flipped", "pickled", "halved"):
        make_adapter(tiny_base, root / name, seed=4)
    weights = {name: root / name / "adapter_model.safetensors" for name in ("torn", "nan", "foreign", "odd", "halved")}
    weights["torn"].write_bytes(weights["torn"].read_bytes()[:-100])
    tensors = load_file(weights["nan"])
    key = next(iter(tensors))
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, weights["nan"])
    save_file({k.replace("layers.0", "layers.9"): v for k, v in tensors.items()}, weights["foreign"])
    save_file({**tensors, key: tensors[key][:, :5].contiguous()}, weights["odd"])
    save_file({k: v for k, v in tensors.items() if k != key}, weights["halved"])
    add_manifest(root / "flipped")
    body = bytearray((root / "flipped" / "adapter_model.safetensors").read_bytes())
    body[-1] ^= 1
    (root / "flipped" / "adapter_model.safetensors").write_bytes(body)
    torch.save({"never": "opened"}, root / "pickled" / "adapter_model.safetensors")
    (root / "bin").mkdir()
    (root / "bin" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"never": "opened"}, root / "bin" / "adapter_model.bin")
    return root


@pytest.fixture(scope="module")
def engine(tiny_base: Path, root: Path) -> Iterator[Engine]:
    """An engine in this process, float32."""
    engine = Engine(Options(base=tiny_base, adapter_root=root, dtype="float32", max_waiting=4))
    yield engine
    engine.scheduler.stop(10)


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    """Its address."""
    with served(build(engine, None)) as url:
        yield url


@pytest.fixture
def http(engine: Engine, url: str) -> Iterator[httpx.Client]:
    """A client; afterwards the engine is empty again."""
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client
    for alias in engine.registry.aliases():
        engine.registry.drop(alias)
    for adapter in engine.registry.adapters():
        if not adapter.draining:
            engine.registry.unload(adapter.name)


def load(http: httpx.Client, name: str, path: object, **more: object) -> httpx.Response:
    """`POST /v1/load_lora_adapter`."""
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def greedy(http: httpx.Client, model: str, prompt: object = "abc", **more: object) -> httpx.Response:
    """A greedy completion of eight tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
    return http.post("/v1/completions", json=body)


def message(response: httpx.Response) -> str:
    """The sentence in an error."""
    return str(response.json()["error"]["message"])


def test_models_are_listed_as_vllm_does(http: httpx.Client, root: Path, tiny_base: Path) -> None:
    """Base, adapters with their path and parent, aliases with their target."""
    load(http, "npc@0001", root / "v1")
    http.put("/v1/aliases/npc", json={"target": "npc@0001"})
    rows = {row["id"]: (row["root"], row["parent"]) for row in http.get("/v1/models").json()["data"]}
    assert rows == {
        "base": (str(tiny_base), None),
        "npc@0001": (str(root / "v1"), "base"),
        "npc": ("npc@0001", "npc@0001"),
    }


def test_a_loaded_adapter_answers_like_peft(http: httpx.Client, root: Path, tiny_base: Path) -> None:
    """Log-probabilities of the slots' arithmetic equal those of PEFT's own forward pass."""
    ids = [1, 40, 50, 60, 70, 80]
    load(http, "npc@0001", root / "v1")
    answer = greedy(http, "npc@0001", ids, max_tokens=0, echo=True, logprobs=1).json()
    found = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert found[1:] == pytest.approx(peft_scores(tiny_base, root / "v1", ids), abs=2e-5)
    assert answer["usage"]["completion_tokens"] == 0


def test_rank_patterns_and_stabilised_scaling_are_peft_s(
    http: httpx.Client, root: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """rank_pattern, alpha_pattern and use_rslora give PEFT's numbers."""
    odd = make_adapter(
        tiny_base, root / "pattern", seed=9, rank=3, alpha=7, use_rslora=True,
        rank_pattern={"q_proj": 5}, alpha_pattern={"layers.1.mlp.up_proj": 2, "o_proj": 11},
    )  # fmt: skip
    ids = [1, 90, 91, 92]
    load(http, "odd", odd)
    answer = greedy(http, "odd", ids, max_tokens=0, echo=True, logprobs=0).json()
    found = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert found == pytest.approx(peft_scores(tiny_base, odd, ids), abs=2e-5)


def test_versions_differ_and_say_who_they_are(http: httpx.Client, root: Path) -> None:
    """Each name answers with its own weights, in the body and in the header."""
    load(http, "npc@0001", root / "v1")
    load(http, "npc@0002", root / "v2")
    answers = {name: greedy(http, name) for name in ("base", "npc@0001", "npc@0002")}
    assert len({answer.json()["choices"][0]["text"] for answer in answers.values()}) == 3
    for name, answer in answers.items():
        assert answer.json()["model"] == answer.headers["X-Adapter-Version"] == name


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("nowhere", 404, "no adapter found"),
        ("bin", 404, "has no adapter_model.safetensors"),
        ("rank32", 400, "--max-rank"),
        ("torn", 400, "torn, or not safetensors"),
        ("pickled", 400, "torn, or not safetensors"),
        ("nan", 400, "NaN"),
        ("foreign", 400, "no linear layer"),
        ("odd", 400, "layer of (inputs, outputs)"),
        ("halved", 400, "not (r, in) and (out, r)"),
        ("flipped", 400, "is not the manifest's"),
        ("..", 403, "not below the adapter root"),
        ("/etc", 403, "not below the adapter root"),
        ("", 400, "must be provided"),
    ],
)
def test_an_unfit_adapter_is_refused_and_nothing_changes(
    http: httpx.Client, root: Path, path: str, status: int, said: str
) -> None:
    """Whatever is wrong with the files: a clear permanent error, no name, no slot lost."""
    response = load(http, "bad", path)
    assert (response.status_code, said in message(response)) == (status, True), response.text
    assert http.get("/v1/lora_adapters").json() == {"data": []}
    assert all(load(http, f"npc@{slot}", root / "v1").status_code == 200 for slot in range(3))


def test_links_do_not_lead_out_of_the_root(http: httpx.Client, root: Path, tmp_path: Path, tiny_base: Path) -> None:
    """A linked directory is resolved before the check; linked files are not opened."""
    outside = make_adapter(tiny_base, tmp_path / "outside", seed=1)
    (root / "link").symlink_to(outside)
    assert load(http, "a", root / "link").status_code == 403
    (root / "filelink").mkdir()
    for file in outside.iterdir():
        (root / "filelink" / file.name).symlink_to(file)
    assert load(http, "a", root / "filelink").status_code == 400


def test_vllm_s_status_codes_for_names(http: httpx.Client, root: Path) -> None:
    """Duplicate 400, unknown 404, base's name 400, unloaded model 404 in a request."""
    assert load(http, "npc@0001", root / "v1").status_code == 200
    assert load(http, "npc@0001", root / "v2").status_code == 400
    assert load(http, "base", root / "v1").status_code == 400
    unload = {"lora_name": "npc@0001"}
    assert http.post("/v1/unload_lora_adapter", json=unload).status_code == 200
    assert http.post("/v1/unload_lora_adapter", json=unload).status_code == 404
    assert greedy(http, "npc@0001").status_code == 404
    assert http.get("/v1/nothing").json()["error"]["code"] == 404


@pytest.mark.parametrize("name", ["a b", "a\nX-Evil: 1", "../a", "é", "*", "a" * 200])
def test_names_are_fit_for_headers_and_logs(http: httpx.Client, root: Path, name: str) -> None:
    """What could break a header, a path or a log line is no name, neither of an adapter nor of an alias."""
    assert load(http, name, root / "v1").status_code == 400
    load(http, "npc@0001", root / "v1")
    quoted = urllib.parse.quote(name, safe="")
    assert http.put(f"/v1/aliases/{quoted}", json={"target": "npc@0001"}).status_code in (400, 404)
    assert http.get("/v1/aliases").json() == {"aliases": {}}


def test_generations_are_compared(http: httpx.Client, root: Path) -> None:
    """The generation names the content: equal for equal files, and 409 when another one was expected."""
    first = load(http, "a", root / "v1").json()["adapter_generation"]
    assert load(http, "b", root / "v1").json()["adapter_generation"] == first
    assert load(http, "c", root / "v2", expected_generation=first).status_code == 409
    assert load(http, "c", root / "v1", expected_generation=first).status_code == 200
    unload = {"lora_name": "a", "expected_generation": "0" * 64}
    assert http.post("/v1/unload_lora_adapter", json=unload).status_code == 409


def test_full_slots_are_said_to_be_full(http: httpx.Client, root: Path) -> None:
    """A fourth adapter in three slots is a 409 that names the loaded ones."""
    for number in range(3):
        load(http, f"npc@{number}", root / "v1")
    response = load(http, "npc@3", root / "v2")
    assert response.status_code == 409 and "npc@0" in message(response)


def test_an_alias_moves_only_from_where_it_was_expected(http: httpx.Client, root: Path) -> None:
    """Compare-and-swap: 409 on a mismatch, 404 for an unknown target, 400 for a taken name."""
    load(http, "npc@0001", root / "v1")
    load(http, "npc@0002", root / "v2")

    def put(target: str, alias: str = "npc", **more: object) -> httpx.Response:
        return http.put(f"/v1/aliases/{alias}", json={"target": target, **more})

    assert put("npc@0001", expected_target=None).json()["previous"] is None
    assert put("npc@0002", expected_target=None).status_code == 409
    assert put("npc@0002", expected_target="base").status_code == 409
    assert greedy(http, "npc").headers["X-Adapter-Version"] == "npc@0001"
    flip = put("npc@0002", expected_target="npc@0001").json()
    assert flip["previous"] == "npc@0001" and flip["flip_ms"] >= 0
    assert greedy(http, "npc").json()["model"] == "npc@0002"
    assert put("npc@0009").status_code == 404
    assert put("npc@0001", alias="base").status_code == 400
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "npc@0002"}).status_code == 409
    assert put("base").status_code == 200
    assert greedy(http, "npc").json()["model"] == "base"
    assert http.get("/v1/aliases").json() == {"aliases": {"npc": "base"}}
    assert http.delete("/v1/aliases/npc").status_code == 204
    assert http.delete("/v1/aliases/npc").status_code == 404


def test_a_running_answer_keeps_its_version_and_its_slot(http: httpx.Client, root: Path) -> None:
    """A flip and an unload in the middle of a stream: it ends on its version, then the slot is free."""
    for number in (1, 2):
        load(http, f"npc@000{number}", root / f"v{number}")
    http.put("/v1/aliases/npc", json={"target": "npc@0001"})
    body = {"model": "npc", "prompt": "abc", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
    whole = http.post("/v1/completions", json={**body, "stream": False}).json()["choices"][0]["text"]
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        pieces = [next(lines)]
        http.put("/v1/aliases/npc", json={"target": "npc@0002"})
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "npc@0001"}).status_code == 200
        states = {row["name"]: row["state"] for row in http.get("/v1/lora_adapters").json()["data"]}
        assert states == {"npc@0001": "draining", "npc@0002": "loaded"}
        assert greedy(http, "npc@0001").status_code == 404
        pieces += [line for line in lines if line]
    chunks = [json.loads(line[6:]) for line in pieces if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert {chunk["model"] for chunk in chunks} == {"npc@0001"}
    assert pieces[-1] == "data: [DONE]"
    assert {row["name"] for row in http.get("/v1/lora_adapters").json()["data"]} == {"npc@0002"}


def test_the_openai_client_streams_and_collects_the_same(http: httpx.Client, url: str) -> None:
    """Chat with seed, stop, usage and log-probabilities, streamed and not."""
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    asked = {
        "model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "temperature": 0.9,
        "top_p": 0.9, "seed": 7, "logprobs": True, "top_logprobs": 2, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    assert whole.usage.completion_tokens == 24
    assert len(whole.choices[0].logprobs.content) == 24
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    assert client.chat.completions.create(**{**asked, "seed": 8}).choices[0].message.content != text
    stop = text[5:8]
    stopped = client.chat.completions.create(**asked, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "x" * 600}, "maximum context length"),
        ({"prompt": "x", "max_tokens": 600}, "maximum context length"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "x", "max_tokens": 0}, "at least 1"),
        ({"prompt": [1, 99999]}, "token ids below"),
        ({"prompt": ["a", "b"]}, "one string or one list"),
        ({"prompt": "x", "n": 2}, "only 1 is supported"),
        ({"prompt": "x", "temperature": 3}, "temperature"),
        ({"prompt": "x", "logit_bias": {"1": 1}}, "not supported"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "seed": 2**70}, "bad request body"),
    ],
)
def test_a_bad_request_says_what_is_bad(http: httpx.Client, body: dict[str, object], said: str) -> None:
    """400 with the reason, and never a crash."""
    response = http.post("/v1/completions", json={"model": "base", **body})
    assert response.status_code == 400 and said in message(response)


def test_a_full_queue_sends_clients_away(http: httpx.Client, engine: Engine) -> None:
    """More than streams + queue at once: 429 with Retry-After, and the admitted ones are answered."""
    import threading

    hold = threading.Event()
    engine.scheduler.between_steps(lambda: hold.wait(20) and None)
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(greedy(http, "base"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(answers) < 2:
        time.sleep(0.01)
    hold.set()
    for thread in threads:
        thread.join(20)
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 2
    assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 429)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_lease(
    http: httpx.Client, url: str, engine: Engine, root: Path, stream: bool
) -> None:
    """The request leaves the batch long before its 500 tokens."""
    load(http, "npc@0001", root / "v1")
    before = produced(http)
    body = {"model": "npc@0001", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(0.05))
    deadline = time.monotonic() + 10
    while engine.registry.adapters()[0].leases and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.registry.adapters()[0].leases == 0
    assert engine.scheduler.load() == (0, 0)
    assert produced(http) - before < 490


def produced(http: httpx.Client) -> int:
    """Tokens handed to clients so far."""
    line = next(
        line for line in http.get("/metrics").text.splitlines() if line.startswith("eternad_serve_tokens_total")
    )
    return int(float(line.split()[1]))


def test_health_and_metrics(http: httpx.Client, engine: Engine, root: Path) -> None:
    """Health names this start; metrics count requests by version and forget unloaded ones."""
    assert http.get("/health").json() | {"running": 0} == {
        "ok": True, "epoch": engine.epoch, "base": "base", "slots": 3, "running": 0, "waiting": 0, "lost_aliases": {},
    }  # fmt: skip
    load(http, "npc@0042", root / "v1")
    greedy(http, "npc@0042")
    assert 'eternad_serve_requests_total{version="npc@0042"} 1.0' in http.get("/metrics").text
    http.post("/v1/unload_lora_adapter", json={"lora_name": "npc@0042"})
    assert "npc@0042" not in http.get("/metrics").text


def test_a_token_is_asked_for_everywhere_but_health(engine: Engine) -> None:
    """401 without or with a wrong token; health stays open for probes."""
    with served(build(engine, "secret")) as url, httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_an_alias_flips_even_when_it_cannot_be_written_down(tiny_base: Path, tmp_path: Path) -> None:
    """A rollback on a full disk: served at once, and the answer says that a restart would forget it."""
    from serving.registry import Registry

    registry = Registry("base", 3, tmp_path / "gone" / "aliases.json")
    flip = registry.point("npc", "base")
    assert registry.lease("npc").version == "base"
    assert "No such file" in (flip.persist_error or "")
