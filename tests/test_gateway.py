"""The gateway as a process, over real sockets, in front of engines that say what was asked of them."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_kit import ASKED, Chatter, Gateway, engines, running, target, wait


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for the whole module."""
    with running(tmp_path_factory.mktemp("gateway"), body_bytes_max=100_000, silence_seconds=5.0) as process:
        yield process


@pytest.fixture
def chatter() -> Chatter:
    """An engine."""
    return Chatter()


@pytest.fixture
def url(chatter: Chatter) -> Iterator[str]:
    """Where it answers."""
    with engines(chatter) as (found,):
        yield found


def ask(gateway: Gateway, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """One request."""
    return httpx.post(
        gateway.url + "/v1/completions", json={**ASKED, **fields}, headers=headers, timeout=30, verify=False
    )


def test_a_request_reaches_the_version_behind_its_name(gateway: Gateway, chatter: Chatter, url: str) -> None:
    """The engine is asked for the version; header and body say which one has answered."""
    gateway.put("npc", target("npc@0001", url))
    answer = ask(gateway, user="u1")
    assert answer.headers["x-adapter-version"] == answer.json()["model"] == "npc@0001"
    assert chatter.seen[-1] == {**ASKED, "model": "npc@0001", "user": "u1"}
    assert ask(gateway, model="npc@0001").status_code == 200


def test_request_ids_are_taken_or_made(gateway: Gateway, chatter: Chatter, url: str) -> None:
    """The client's own reaches the engine and comes back; what could not stand in a log is replaced."""
    gateway.put("npc", target("npc@0001", url))
    assert ask(gateway, {"X-Request-Id": "game-17"}).headers["x-request-id"] == "game-17"
    assert chatter.headers[-1]["x-request-id"] == "game-17"
    made = ask(gateway, {"X-Request-Id": "two words"}).headers["x-request-id"]
    assert made.startswith("req-") and chatter.headers[-1]["x-request-id"] == made
    assert ask(gateway, {"X-Request-Id": "kept"}, model="nobody").headers["x-request-id"] == "kept"


@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_own_name_is_asked_for_and_ours_is_said(
    gateway: Gateway, chatter: Chatter, url: str, stream: bool
) -> None:
    """SGLang wants `base:npc@0001`, LoRAX a field more; the player reads `npc@0001` in every event."""
    gateway.put("npc", target("npc@0001", url, model="base:npc@0001", extra={"adapter_source": "local"}))
    answer = ask(gateway, stream=stream)
    assert chatter.seen[-1]["model"] == "base:npc@0001" and chatter.seen[-1]["adapter_source"] == "local"
    bodies = [answer.text] if not stream else [line[6:] for line in answer.text.splitlines() if line[6:7] == "{"]
    assert {json.loads(body)["model"] for body in bodies} == {"npc@0001"}
    assert len(bodies) == (5 if stream else 1)


def test_a_stream_is_passed_through_byte_by_byte(gateway: Gateway, chatter: Chatter, url: str) -> None:
    """What the engine wrote is what the client reads, and it comes while the engine still writes."""
    gateway.put("npc", target("npc@0001", url))
    chatter.delay_seconds = 0.05
    direct = httpx.post(url + "/v1/completions", json={**ASKED, "model": "npc@0001", "stream": True}).content
    chatter.sent = 0
    with httpx.stream("POST", gateway.url + "/v1/completions", json={**ASKED, "stream": True}) as answer:
        pieces = answer.iter_raw()
        first = next(pieces)
        assert chatter.sent < chatter.words
        assert first + b"".join(pieces) == direct
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_a_slow_reader_slows_the_engine_down(gateway: Gateway, chatter: Chatter, url: str) -> None:
    """60 MB that nobody reads do not pile up in the gateway: the engine has to wait (the kernel's buffers take 20)."""
    gateway.put("npc", target("npc@0001", url))
    chatter.word, chatter.words = "x" * 10_000, 6000
    with socket.create_connection(("127.0.0.1", gateway.port)) as client:
        body = json.dumps({**ASKED, "stream": True}).encode()
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait(lambda: chatter.sent > 50)
        before = -1
        while before != chatter.sent:
            before = chatter.sent
            threading.Event().wait(0.3)
        assert chatter.sent < 4000
        read = 0
        while b"[DONE]" not in (data := client.recv(1 << 20)):
            read += len(data)
        assert read > 59_000_000


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_work_in_the_engine(
    gateway: Gateway, chatter: Chatter, url: str, stream: bool
) -> None:
    """In the middle of a stream, and before the first byte; it counts as cancelled, not as failed."""
    gateway.put("npc", target("npc@0009", url))
    before = gateway.traffic("npc@0009").get("cancelled", 0)
    chatter.delay_seconds, chatter.words = 0.2 if stream else 5.0, 1000
    asked = {"json": {**ASKED, "stream": stream}, "timeout": 0.5}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", gateway.url + "/v1/completions", **asked) as answer,
    ):
        next(answer.iter_raw())
    wait(lambda: chatter.cut_off == 1, what="the engine's end")
    wait(lambda: gateway.traffic("npc@0009")["cancelled"] == before + 1)
    assert gateway.traffic("npc@0009")["inflight"] == gateway.traffic("npc@0009")["failed"] == 0


@pytest.mark.parametrize("trouble", ["refused", 503, "dropped"])
def test_another_replica_answers_when_one_fails(
    gateway: Gateway, chatter: Chatter, url: str, trouble: str | int
) -> None:
    """No connection, 503, or an end without an answer: the player notices nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bad = f"http://127.0.0.1:{listener.getsockname()[1]}"
        other = Chatter("b")
        other.failures = [503] * 100
        with engines(other) as (busy,):
            if trouble == "dropped":
                threading.Thread(target=lambda: listener.accept()[0].close()).start()
            elif trouble == "refused":
                listener.close()
            first = busy if trouble == 503 else bad
            gateway.put("npc", target("npc@0001", first, url))
            assert ask(gateway).json()["id"] == "a"
            assert ask(gateway, stream=True).status_code == 200  # the one that failed rests
            assert len(chatter.seen) == 2


def test_a_stream_that_dies_before_its_first_event_is_asked_elsewhere(
    gateway: Gateway, chatter: Chatter, url: str
) -> None:
    """Head sent, no event yet: still in time for another replica."""
    dying = Chatter("b")
    dying.breaks_after = 0
    with engines(dying) as (bad,):
        gateway.put("npc", target("npc@0001", bad, url))
        answer = ask(gateway, stream=True)
    assert "[DONE]" in answer.text and len(dying.seen) == 1


def test_without_another_replica_the_client_is_told(gateway: Gateway) -> None:
    """502 in OpenAI's shape, at once."""
    gateway.put("npc", target("npc@0001", "http://127.0.0.1:1"))
    answer = ask(gateway)
    assert answer.status_code == 502 and answer.json()["error"]["code"] == "upstream_failed"
    assert "npc@0001 cannot be reached" in answer.json()["error"]["message"]


def test_a_stream_that_breaks_ends_with_an_error_event(gateway: Gateway, chatter: Chatter, url: str) -> None:
    """Never with a silent end that looks like a short answer."""
    gateway.put("npc", target("npc@0008", url))
    chatter.breaks_after = 2
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="-", max_retries=0) as client:
        stream = client.chat.completions.create(model="npc", messages=[], stream=True)
        with pytest.raises(openai.APIError, match="npc@0008 broke off"):
            list(stream)
    assert gateway.traffic("npc@0008")["failed"] == 1


def test_a_connection_that_the_engine_closed_is_no_failure(gateway: Gateway) -> None:
    """An engine that ends every kept connection after its answer, without saying so: each request gets a new one."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"

    def rude(listener: socket.socket) -> None:
        for _ in range(20):
            with contextlib.closing(listener.accept()[0]) as connection:
                connection.recv(65536)
                connection.sendall(head)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=rude, args=(listener,))
        thread.start()
        gateway.put("npc", target("npc@0001", f"http://127.0.0.1:{listener.getsockname()[1]}"))
        assert [ask(gateway).status_code for _ in range(20)] == [200] * 20
        thread.join(10)


def test_errors_have_openais_shape(gateway: Gateway, chatter: Chatter, url: str) -> None:
    """Unknown name, no JSON, too large, wrong method, wrong page; the engine's own errors pass as they are."""
    gateway.put("npc", target("npc@0001", url))
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="-", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="`nobody` does not exist; there are: npc"):
            client.completions.create(model="nobody", prompt="x")
        assert {row.id for row in client.models.list()} >= {"npc", "npc@0001"}
    page = gateway.url + "/v1/completions"
    found = [
        httpx.post(page, content=b"{"), httpx.post(page, json={"model": 3}), httpx.post(page, content=b" " * 100_001),
        httpx.get(page), httpx.get(gateway.url + "/aliases"),
    ]  # fmt: skip
    assert [answer.status_code for answer in found] == [400, 400, 413, 405, 404]
    assert all(set(answer.json()["error"]) == {"message", "type", "param", "code"} for answer in found)
    chatter.failures = [429]
    assert ask(gateway).json() == {"error": {"message": "scripted"}}


def test_admin_compares_before_it_swaps(gateway: Gateway, url: str) -> None:
    """The second of two writers gets 409 and reads again; nonsense is 400; a removed name is not found."""
    seen = gateway.put("cas", target("cas@0001", url)).json()["route"]["generation"]
    first = gateway.put("cas", target("cas@0002", url), expected_generation=seen)
    second = gateway.put("cas", target("cas@0003", url), expected_generation=seen)
    assert (first.status_code, second.status_code) == (200, 409)
    assert first.json()["previous"]["targets"][0]["version"] == "cas@0001"
    assert gateway.admin("GET", "/aliases/cas").json()["targets"][0]["version"] == "cas@0002"
    assert gateway.put("cas").status_code == gateway.put("cas", target("x", "y")).status_code == 400
    assert gateway.admin("DELETE", f"/aliases/cas?expected_generation={seen}").status_code == 409
    assert gateway.admin("DELETE", "/aliases/cas").status_code == 200
    assert gateway.admin("GET", "/aliases/cas").status_code == 404
    assert gateway.admin_socket.stat().st_mode & 0o777 == 0o660


def test_of_many_writers_exactly_one_wins_each_generation(gateway: Gateway, url: str) -> None:
    """Eight at once, five rounds."""
    gateway.put("race", target("race@0000", url))
    for _ in range(5):
        seen = gateway.admin("GET", "/aliases/race").json()["generation"]
        answers: list[int] = []

        def write(number: int, seen: int = seen, answers: list[int] = answers) -> None:
            body = target(f"race@{number:04d}", url)
            answers.append(gateway.put("race", body, expected_generation=seen).status_code)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [200] + [409] * 7


def test_a_drain_waits_for_what_runs(gateway: Gateway, chatter: Chatter, url: str) -> None:
    """The old version answers to the end after the swap; draining before it is refused, and a wait can be too short."""
    gateway.put("npc", target("npc@0001", url))
    chatter.delay_seconds = 0.15
    with httpx.stream("POST", gateway.url + "/v1/completions", json={**ASKED, "stream": True}) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        assert gateway.admin("POST", "/drain", {"version": "npc@0001"}).status_code == 409
        gateway.put("npc", target("npc@0002", url))
        assert gateway.admin("GET", "/inflight").json()["versions"]["npc@0001"] == 1
        short = gateway.admin("POST", "/drain", {"version": "npc@0001", "deadline_seconds": 0.05}).json()
        assert short == {"version": "npc@0001", "drained": False, "inflight": 1}
        drain = threading.Thread(target=lambda: done.append(gateway.admin("POST", "/drain", {"version": "npc@0001"})))
        done: list[httpx.Response] = []
        drain.start()
        rest = b"".join(pieces)
    drain.join(20)
    assert done[0].json()["drained"] and b"[DONE]" in rest and b"npc@0002" not in rest
    assert gateway.admin("POST", "/drain", {"version": "never"}).json()["drained"]


def test_a_shadow_is_asked_and_its_answer_thrown_away(gateway: Gateway, chatter: Chatter, url: str) -> None:
    """Every request is copied; failures of the shadow are counted and reach nobody."""
    shadow = Chatter("shadow")
    with engines(shadow) as (there,):
        gateway.put("npc", target("npc@0001", url), shadow=target("npc@0007", there))
        shadow.failures = [500] * 3
        answers = [ask(gateway, stream=bool(number % 2)) for number in range(8)]
        wait(lambda: gateway.traffic("npc@0007").get("shadowed") == 5)
    assert all(answer.headers["x-adapter-version"] == "npc@0001" for answer in answers)
    assert {answer.status_code for answer in answers} == {200}
    assert {asked["model"] for asked in shadow.seen} == {"npc@0007"}
    numbers = gateway.traffic("npc@0007")
    assert (numbers["shadow_failed"], numbers["answered"], numbers["failed"], numbers["inflight"]) == (3, 0, 0, 0)


def test_sessions_stick_over_http(gateway: Gateway, url: str) -> None:
    """By header, else by the field `user`; both versions get something."""
    gateway.put("npc", target("npc@0001", url), target("npc@0002", url))
    by_header = [[ask(gateway, {"X-Session-Id": f"s{n}"}).json()["model"] for _ in range(3)] for n in range(16)]
    by_user = [ask(gateway, user=f"s{n}").json()["model"] for n in range(16)]
    assert all(len(set(each)) == 1 for each in by_header)
    assert [each[0] for each in by_header] == by_user and len(set(by_user)) == 2


def test_the_front_door_does_not_open_the_admins(gateway: Gateway) -> None:
    """Neither by its pages nor by a longer path."""
    for path in ("/aliases", "/inflight", "/traffic", "/v1/../aliases", "//aliases"):
        assert httpx.get(gateway.url + path).status_code == 404


def test_a_token_is_asked_for_and_not_passed_on(tmp_path: Path, chatter: Chatter, url: str) -> None:
    """401 without; with it the engine sees nothing of it; the admin socket's front needs none."""
    (tmp_path / "token").write_text("secret\n")
    with running(tmp_path, token_file="token") as gateway:
        gateway.put("npc", target("npc@0001", url))
        assert ask(gateway).status_code == 401 and ask(gateway, {"Authorization": "Bearer x"}).status_code == 401
        assert ask(gateway, {"Authorization": "Bearer secret"}).status_code == 200
        assert "authorization" not in chatter.headers[-1]
        assert gateway.admin("POST", "/v1/completions", ASKED).status_code == 200
        assert gateway.stop() == 0


def test_sigterm_lets_what_runs_finish(tmp_path: Path, chatter: Chatter, url: str) -> None:
    """The stream ends whole, then the process."""
    with running(tmp_path) as gateway:
        gateway.put("npc", target("npc@0001", url))
        chatter.delay_seconds = 0.2
        with httpx.stream("POST", gateway.url + "/v1/completions", json={**ASKED, "stream": True}) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            assert gateway.process is not None
            gateway.process.terminate()
            assert b"[DONE]" in b"".join(pieces)
        assert gateway.process.wait(30) == 0


def test_a_restart_serves_what_was_served_and_takes_sockets_over(tmp_path: Path, chatter: Chatter, url: str) -> None:
    """kill -9 and a new process; a damaged file is refused with status 1, not served as an empty table."""
    with running(tmp_path) as gateway:
        gateway.put("npc", target("npc@0001", url, model="engines name", weight=2.0))
        before = gateway.admin("GET", "/aliases").json()
        gateway.kill()
        gateway.start()
        assert gateway.admin("GET", "/aliases").json() == before
        assert ask(gateway).json()["model"] == "npc@0001"
        gateway.kill()
        gateway.table_file.write_text("{")
        with pytest.raises(AssertionError, match="ended with 1"):
            gateway.start()


def test_concurrent_clients_of_one_connection_pool(gateway: Gateway, chatter: Chatter, url: str) -> None:
    """64 at once: every answer is its own question's."""
    gateway.put("npc", target("npc@0001", url))

    async def all_at_once() -> list[str]:
        async with httpx.AsyncClient(timeout=30) as client:
            ids = [f"id-{number}" for number in range(64)]
            page = gateway.url + "/v1/completions"
            done = await asyncio.gather(*(client.post(page, json=ASKED, headers={"X-Request-Id": i}) for i in ids))
            return [answer.headers["x-request-id"] for answer in done]

    assert asyncio.run(all_at_once()) == [f"id-{number}" for number in range(64)]


def test_a_head_without_end_is_refused(gateway: Gateway) -> None:
    """Not collected for ever: the connection is closed after 64 KiB."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(200):
                client.sendall(b"X-%d: " % number + b"x" * 1000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert client.recv(100).startswith(b"HTTP/1.1 400") and b"" in iter(lambda: client.recv(65536), None)
    assert httpx.get(gateway.url + "/health").status_code == 200
