"""The status page: what it shows, whom it lets in, what it lets them do; and `/metrics`."""

import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from operator_kit import learn, make_config, make_state, obey, report_of, snapshot

from buffers.inventory import Age
from daemon import web
from daemon.config import Config, load
from daemon.control import Commands
from daemon.state import runs
from daemon.state.database import open_database, open_read_only
from daemon.web import charts, metrics, pages

TOKEN = "a-long-token"
PAGES = ("/", "/models/npc", "/models/book", "/runs", "/runs?model=npc", "/quarantine", "/log",
         "/runs/npc-00001", "/runs/npc-00003", "/runs/npc-00004")  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration with a page, and a state with a past."""
    directory = tmp_path_factory.mktemp("web")
    (directory / "token").write_text(TOKEN + "\n")
    make_state(directory)
    return load(make_config(directory, '[web]\nlisten = "127.0.0.1:0"\ntoken_file = "token"'))


@pytest.fixture(scope="module")
def address(config: Config) -> Iterator[str]:
    """Where the page is served, by a daemon that answers orders."""
    commands: Commands = queue.Queue()
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            try:
                obey(commands.get(timeout=0.05))
            except queue.Empty:
                continue

    thread = threading.Thread(target=loop)
    thread.start()
    handle = web.serve(lambda: config, commands, snapshot)
    assert handle is not None
    yield f"http://{handle.address}"
    handle.close()
    stop.set()
    thread.join()


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    """Somebody who has not signed in."""
    with httpx.Client(base_url=address, headers={"Origin": address}) as found:
        yield found


@pytest.fixture
def operator(client: httpx.Client) -> httpx.Client:
    """Somebody who has."""
    assert client.post("/session", data={"token": TOKEN}).status_code == 303
    return client


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_whole_and_loads_nothing_from_elsewhere(client: httpx.Client, path: str) -> None:
    """No other host, no inline script or style, one h1, a language, a title."""
    answer = client.get(path)
    assert answer.status_code == 200
    text = answer.text
    assert text.count("<h1>") == 1 and '<html lang="en">' in text and "· eternad</title>" in text
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert " style=" not in text and "<style" not in text and " onclick" not in text
    assert text.count("<script") == 1 and '<script src="/static/page.js" defer></script>' in text


def test_the_front_page_shows_the_pipeline(client: httpx.Client) -> None:
    """Each model's version, engine, wait, run with progress, last verdict, refusals."""
    text = client.get("/").text
    assert "version 2, for" in text and "3 of 32 examples" in text
    assert '<progress max="100" value="45"' in text and "step 45 of 100, loss 1.250, 312 tokens/s, 12 s left" in text
    assert "state-rejected" in text and "1 in quarantine" in text and "the base model" in text


def test_a_models_page_shows_what_it_still_knows(client: httpx.Client) -> None:
    """The matrix of losses, drift, lineage and buffer."""
    text = client.get("/models/npc").text
    assert re.search(r'<th scope="row">version 1</th><td class="heat-0">1\.00</td><td class="none">', text)
    assert re.search(r'<th scope="row">base</th><td class="heat-6">3\.00</td>', text)
    assert "18 of at most 2000 examples, 18 learned" in text
    assert "KL divergence by version" in text


def test_a_runs_page_shows_verdict_losses_and_answers(client: httpx.Client) -> None:
    """Reasons, intervals, the loss curve; before and after, as text whatever a model writes."""
    text = client.get("/runs/npc-00002").text
    assert "Verdict:" in text and "loss on the new hold-out 2.500 -&gt; 0.800" in text
    assert "<strong>9</strong> new" in text and "<polyline" in text and "-1.700 [-1.800, -1.600]" in text
    assert "I am &lt;b&gt;1.0&lt;/b&gt;\\x1b[31m" in text and "I am &lt;b&gt;0.8&lt;/b&gt;" in text
    assert "<b>0.8" not in text and "\x1b" not in text


def test_what_does_not_exist_is_a_page_that_says_so(client: httpx.Client) -> None:
    """404 with the way back."""
    for path in ("/runs/npc-99999", "/models/nobody", "/static/secret", "/nothing"):
        answer = client.get(path)
        assert answer.status_code == 404 and "Back to the pipeline" in answer.text


def test_every_answer_carries_a_strict_policy(client: httpx.Client) -> None:
    """Pages, files, failures and refusals alike."""
    for answer in (client.get("/"), client.get("/static/style.css"), client.get("/nothing"),
                   client.get("/", headers={"Host": "evil.example"})):  # fmt: skip
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_other_hosts_names_and_other_sites_posts_are_refused(operator: httpx.Client) -> None:
    """DNS rebinding and cross-site requests end before any page runs."""
    assert operator.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert operator.get("/", headers={"Host": "localhost"}).status_code == 200
    for origin in ("http://evil.example", "null"):
        assert operator.post("/orders", data={"action": "scan"}, headers={"Origin": origin}).status_code == 403


def test_without_signing_in_the_page_only_shows(client: httpx.Client) -> None:
    """No buttons, and posts are refused."""
    assert 'action="/orders"' not in client.get("/models/npc").text
    assert client.post("/orders", data={"action": "scan"}).status_code == 403
    assert client.post("/session", data={"token": "wrong"}).status_code == 403
    client.cookies.set("eternad_session", "0" * 64)
    assert client.post("/orders", data={"action": "scan"}).status_code == 403


def test_the_session_cookie_does_not_hold_the_token(operator: httpx.Client) -> None:
    """Http-only, same site only, and ended by signing out."""
    assert TOKEN not in str(operator.cookies)
    cookie = operator.post("/session", data={"token": TOKEN}).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert 'action="/orders"' in operator.get("/").text
    operator.post("/sign-out")
    assert 'action="/orders"' not in operator.get("/").text


def test_an_order_goes_to_the_daemon_and_its_answer_is_shown(operator: httpx.Client) -> None:
    """By way of the queue, as `web`, and back to the page that it came from."""
    fields = {"action": "rollback", "model": "npc", "version": "1", "back": "/models/npc"}
    answer = operator.post("/orders", data=fields)
    assert answer.status_code == 303 and answer.headers["location"].startswith("/models/npc?said=")
    assert "rollback npc 1 None by web" in operator.get(answer.headers["location"]).text


@pytest.mark.parametrize(
    "back", ["//evil.example", "https://evil.example/", "/\\evil.example", "/x\r\nSet-Cookie: a=b"]
)
def test_an_order_never_leads_to_another_site(operator: httpx.Client, back: str) -> None:
    """`back` is a path of ours or nothing."""
    answer = operator.post("/orders", data={"action": "scan", "back": back})
    assert answer.headers["location"].startswith("/?said=")


def test_what_is_no_order_is_refused(operator: httpx.Client) -> None:
    """Unknown actions and fields, and forms without end."""
    assert operator.post("/orders", data={"action": "destroy"}).status_code == 400
    assert operator.post("/orders", data={"action": "scan", "shell": "x"}).status_code == 400
    assert operator.post("/orders", data={"action": "scan", "model": "x" * 5000}).status_code == 413


def test_without_a_token_file_nobody_can_sign_in(config: Config) -> None:
    """Read-only is the default."""
    replace = msgspec.structs.replace
    only_shows = replace(config, web=replace(config.web, token_file=None))
    handle = web.serve(lambda: only_shows, queue.Queue(), snapshot)
    assert handle is not None
    origin = f"http://{handle.address}"
    try:
        with httpx.Client(base_url=origin, headers={"Origin": origin}) as client:
            assert "Sign in" not in client.get("/").text
            assert client.post("/session", data={"token": ""}).status_code == 403
            assert client.post("/orders", data={"action": "scan"}).status_code == 403
    finally:
        handle.close()


def test_an_address_that_is_taken_leaves_the_daemon_without_its_page(
    config: Config, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so and goes on; with no address there is no page."""
    replace = msgspec.structs.replace
    taken = replace(config, web=replace(config.web, listen=address.removeprefix("http://")))
    assert web.serve(lambda: taken, queue.Queue(), snapshot) is None
    assert "no status page" in caplog.text
    off = replace(config, web=replace(config.web, listen=""))
    assert web.serve(lambda: off, queue.Queue(), snapshot) is None


def scraped(text: str) -> dict[str, float]:
    """`{'eternad_up': 1.0, ...}` of Prometheus' text format."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_metrics_tell_what_an_alert_needs(client: httpx.Client) -> None:
    """Lag, run, gate, desired against actual version, quarantine, disk, and the daemon's own counters."""
    found = scraped(client.get("/metrics").text)
    npc = '{model="npc"}'
    assert found["eternad_up"] == 1 and found["eternad_disk_low"] == 0
    assert found['eternad_pending_examples{model="npc",split="train"}'] == 3
    assert found[f"eternad_pending_oldest_age_seconds{npc}"] > 0
    assert found[f"eternad_run_step{npc}"] == 45 and found[f"eternad_gate_accepted{npc}"] == 0
    assert found[f"eternad_desired_version{npc}"] == found[f"eternad_serving_version{npc}"] == 2
    assert found[f"eternad_in_sync{npc}"] == 1 and found['eternad_desired_version{model="book"}'] == 0
    assert found['eternad_quarantined{code="not_utf8",model="npc"}'] == 1
    assert found['eternad_runs{model="npc",state="REJECTED"}'] == 1
    assert found['eternad_heldout_loss{holdout="new",model="npc",point="after"}'] == 4.0
    assert found['eternad_swap_seconds{model="npc",phase="total"}'] == 0.04
    assert found["eternad_overflow_total"] == 1 and found["process_resident_memory_bytes"] > 0


def test_there_are_more_than_forty_kinds_of_metrics(config: Config) -> None:
    """Each with a meaning in its help line."""
    connection = open_read_only(config.state_directory / "eternad.db")
    text = metrics.text(config, connection, snapshot()).decode()
    connection.close()
    helped = re.findall(r"^# HELP (eternad_\w+) (.+)$", text, re.MULTILINE)
    assert len({name for name, _ in helped}) >= 40


def test_the_lineage_moves_to_the_right_only_at_a_branch(tmp_path: Path) -> None:
    """After a rollback the next update starts another branch."""

    def version(number: int, parent: int | None) -> runs.Version:
        return runs.Version(
            model="npc", number=number, run_id="r", parent=parent, state="superseded", manifest_sha256="",
            published_at=0.0, activated_at=None, activation=None,
        )  # fmt: skip

    tree = pages.lineage([version(4, 2), version(3, 1), version(2, 1), version(1, None)])
    assert [(depth, each.number) for depth, each in tree] == [(0, 1), (1, 2), (1, 4), (0, 3)]


def test_many_updates_are_one_row_of_the_buffer(config: Config) -> None:
    """A model's page does not grow with its age."""
    rows = pages.grouped([Age(update=n, learned=10, held=1, tokens=5, bytes=20) for n in range(1, 1001)])
    assert len(rows) == 21 and rows[0] == pages.Share(name="1 to 980", learned=9800, held=980)
    assert [row.name for row in pages.grouped([Age(update=7, learned=1, held=1, tokens=5, bytes=20)])] == ["7"]


def test_forgetting_is_the_rise_since_each_update() -> None:
    """Mean over the updates before the last, as in BWT."""
    first, second = (
        msgspec.convert(
            {"id": f"r{n}", "model": "npc", "state": "LIVE", "trigger": "t", "reason": "", "update_number": n,
             "parent_version": None, "version": n, "attempts": 0, "pid": None, "created_at": 0.0, "updated_at": 0.0,
             "cut": None, "verdict": None}, runs.Run,
        )
        for n in (1, 2)
    )  # fmt: skip
    found = pages.matrix([(first, report_of("r1", 1.0)), (second, report_of("r2", 1.5))])
    assert found.updates == [1, 2] and found.forgotten == pytest.approx(0.5)
    assert [row.mean for row in found.rows] == [3.0, 1.0, 1.5]
    assert pages.matrix([]).rows == []


def test_charts_survive_flat_and_empty_series() -> None:
    """No division by zero, nothing drawn of nothing, names escaped."""
    assert charts.lines("t", {}, "x", "y") == "" and charts.intervals("t", []) == ""
    assert "nan" not in charts.lines("t", {"a": [(1, 0.0), (2, 0.0)]}, "x", "y")
    assert "&lt;script&gt;" in charts.intervals("t", [("<script>", 0.0, 0.0, 0.0)])
    assert [charts.level(value, 0.0, 1.0) for value in (0.0, 0.5, 1.0)] == [0, 3, 6]
    assert charts.level(1.0, 1.0, 1.0) == 0


def test_a_long_loss_curve_is_thinned_but_keeps_its_end() -> None:
    """A page stays small after a million steps."""
    thinned = pages._thinned([(step, 1.0) for step in range(100_000)])
    assert len(thinned) <= pages.POINTS + 1 and thinned[-1][0] == 99_999


def test_the_page_costs_the_daemon_little_memory(config: Config) -> None:
    """All pages and the metrics rendered, the process stays below 64 MiB; torch is never imported."""
    code = (
        "import queue, sys, httpx, resource, urllib.request; from pathlib import Path; from daemon import web;"
        "from daemon.config import load; c = load(Path(sys.argv[1]));"
        "h = web.serve(lambda: c, queue.Queue(), dict);"
        "[urllib.request.urlopen(f'http://{h.address}{p}').read() for p in sys.argv[2:]];"
        "assert 'torch' not in sys.modules;"
        "rss = int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]);"
        "print(rss)"
    )
    path = config.state_directory.parent / "eternad.toml"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), *PAGES, "/metrics"], capture_output=True, text=True, check=False,
        cwd=Path(web.__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024


def test_the_front_page_lists_the_latest_ten_runs(tmp_path: Path) -> None:
    """However many there were: the page does not grow with the past."""
    config = load(make_config(tmp_path))
    connection = open_database(config.state_directory / "eternad.db")
    for number in range(1, 13):
        learn(connection, config.state_directory, number, 4.0)
    shown = [run.id for run in pages.overview(config, connection, {})["runs"]]
    connection.close()
    assert shown == [f"npc-{number:05d}" for number in range(12, 2, -1)]
