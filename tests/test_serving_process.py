"""The embedded engine as a process: what it survives, how it ends, and swaps under load over real sockets."""

import concurrent.futures
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from serving_kit import EngineProcess, make_adapter, peft_scores

from daemon.engines.activate import activate, make_room
from daemon.engines.contract import Version
from daemon.engines.embedded import Embedded
from daemon.engines.reconcile import Desired, reconcile
from strategies.request import Canary

PROMPT, ANSWER = [1, 40, 41, 42, 43], [60, 61, 62, 63]


@pytest.fixture(scope="module")
def versions(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    """npc@0001 .. npc@0004, different from each other and from the base."""
    root = tmp_path_factory.mktemp("versions")
    return [
        Version(model="npc", number=number, path=make_adapter(tiny_base, root / f"{number:04d}", seed=number))
        for number in range(1, 5)
    ]


@pytest.fixture(scope="module")
def process(
    tiny_base: Path, versions: list[Version], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """One engine process for this module, with an alias file."""
    aliases = tmp_path_factory.mktemp("aliases") / "aliases.json"
    process = EngineProcess(
        "--base", tiny_base, "--adapter-root", versions[0].path.parent, "--alias-file", aliases, "--dtype", "float32"
    )
    yield process
    if process.process.poll() is None:
        assert process.terminate() == 0


@pytest.fixture
def engine(process: EngineProcess) -> Iterator[Embedded]:
    """The daemon's client of it."""
    client = Embedded(process.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def canaries(tiny_base: Path, versions: list[Version]) -> dict[str, list[Canary]]:
    """What a trainer would have written into each version's manifest: PEFT's own scores."""
    ids, start = [*PROMPT, *ANSWER], len(PROMPT) - 1
    base = peft_scores(tiny_base, None, ids)[start:]
    return {
        version.name: [
            Canary(
                prompt="?", prompt_token_ids=PROMPT, token_ids=ANSWER, base_logprobs=base,
                logprobs=peft_scores(tiny_base, version.path, ids)[start:],
            )
        ]
        for version in versions
    }  # fmt: skip


def ask(url: str, model: str) -> tuple[str, str]:
    """(version, text) of a greedy answer."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    answer.raise_for_status()
    assert answer.headers["X-Adapter-Version"] == answer.json()["model"]
    return answer.json()["model"], answer.json()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("swaps", "requests"),
    [(100, 500), pytest.param(1000, 10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_swaps_under_load_fail_no_request(
    process: EngineProcess,
    engine: Embedded,
    versions: list[Version],
    canaries: dict[str, list[Canary]],
    swaps: int,
    requests: int,
) -> None:
    """Activations under 8 clients that stream: every answer is one version's whole answer, none fails."""
    expected = {}
    for version in versions:
        activate(engine, "npc", version, canaries[version.name])
        expected[version.name] = ask(process.url, version.name)[1]
    assert len(set(expected.values())) == len(versions)
    swapping = True

    def play() -> list[str]:
        client = openai.OpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0, timeout=60)
        asked = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
        seen = []
        with client:
            while swapping or len(seen) < requests / 8:
                stream = client.completions.create(model="npc", stream=True, **asked)
                chunks = list(stream)
                (version,) = {chunk.model for chunk in chunks}
                assert "".join(chunk.choices[0].text for chunk in chunks) == expected[version], version
                seen.append(version)
        return seen

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        players = [pool.submit(play) for _ in range(8)]
        try:
            for swap in range(swaps):
                version = versions[swap % 4]
                assert activate(engine, "npc", version, canaries[version.name]).version == version.name
        finally:
            swapping = False
        seen = [version for player in players for version in player.result()]
    assert len(seen) >= requests
    assert set(seen) == set(expected)


def test_a_killed_engine_comes_back_with_its_versions(
    process: EngineProcess,
    engine: Embedded,
    tiny_base: Path,
    versions: list[Version],
    canaries: dict[str, list[Canary]],
) -> None:
    """SIGKILL: the next start serves the same alias by itself, and the daemon only probes it again.

    An alias whose files have changed meanwhile is a 404 that health explains, rather than wrong answers.
    """
    epoch = engine.health().epoch
    activate(engine, "npc", versions[1], canaries["npc@0002"])
    changed = make_adapter(tiny_base, versions[0].path.parent / "0009", seed=9)
    make_room(engine, "book@0009")
    engine.load(Version(model="book", number=9, path=changed))
    engine.route("book", "book@0009", None)
    before = ask(process.url, "npc")
    make_adapter(tiny_base, changed, seed=10)
    process.kill()
    process.start()
    assert ask(process.url, "npc") == before
    wish = Desired(alias="npc", version=versions[1], canaries=canaries["npc@0002"], previous=versions[0])
    done = reconcile(engine, [wish], epoch)
    assert done.epoch != epoch and not done.errors
    assert done.activations[0].previous == "npc@0002" and done.reloaded == ["npc@0001"]
    assert httpx.post(process.url + "/v1/completions", json={"model": "book", "prompt": "a"}).status_code == 404
    assert "generation" in httpx.get(process.url + "/health").json()["lost_aliases"]["book"]


def test_sigterm_lets_running_streams_end(process: EngineProcess) -> None:
    """A stream that has begun is answered to its end, nobody new gets in, and the exit code is 0."""
    body = {"model": "npc", "prompt": PROMPT, "max_tokens": 480, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", process.url + "/v1/completions", json=body, timeout=30) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert process.process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(process.url + "/health")


def test_a_unix_socket_with_token_tells_systemd(tiny_base: Path, tmp_path: Path) -> None:
    """`--uds` is for this user only, `--token-file` is asked for, READY=1 and STOPPING=1 are sent."""
    (tmp_path / "token").write_text("secret\n")
    notify, uds = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), tmp_path / "engine.sock"
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(60)
    arguments = ["--base", tiny_base, "--adapter-root", tmp_path, "--uds", uds, "--token-file", tmp_path / "token"]
    process = EngineProcess(*arguments, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}, waits=False)
    with notify:
        assert notify.recv(100) == b"READY=1"
        assert stat.S_IMODE(uds.stat().st_mode) & 0o077 == 0
        stranger, friend = Embedded("http://engine", uds=uds), Embedded("http://engine", uds=uds, token="secret")
        assert friend.loaded() == [] and friend.health().ok
        with pytest.raises(Exception, match="401"):
            stranger.loaded()
        stranger.close()
        friend.close()
        started = time.monotonic()
        assert process.terminate() == 0
        assert notify.recv(100) == b"STOPPING=1"
        assert time.monotonic() - started < 30
    assert os.environ.get("NOTIFY_SOCKET") is None
