"""A daemon, a gateway and an engine as processes of their own, and the way to kill any of them in mid-swap.

`swap_lab.py daemon DIRECTORY` and `swap_lab.py engine DIRECTORY PORT` are two of them; the third is `eternad gateway`.
"""

import hashlib
import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import httpx
from fake_dialects import FakeVllm
from fake_engine import PROMPT, error
from kill_kit import Child, look
from service_kit import prepare_lab
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daemon import publish
from daemon.control import Client, NotRunning, Order
from daemon.state import rollouts, runs

HERE = Path(__file__).resolve().parent
TOKENS = [7, 8, 9]
CONFIG = """
library_directory = "library"
state_directory = "state"
tick_seconds = 0.02
disk_free_bytes_min = 0
run_attempts_max = 1000
[watch]
stability_seconds = 0.0
scan_seconds = 0.2
[gateway]
address = "127.0.0.1:{gateway}"
[engines.local]
kind = "vllm"
urls = ["http://127.0.0.1:{engine}"]
timeout_seconds = 5.0
reconcile_seconds = 0.2
[models.npc]
base_path = "base"
engine = "local"
versions_kept = 2
[models.npc.schedule]
threshold_examples = 5
quiet_seconds = 0.0
[models.npc.rollout]
policy = "{policy}"
percentages = [50]
soak_seconds = 0.05
requests_min = 0
"""
# as the scripted trainer, with a canary by which each adapter is known: its fingerprint is made of its weights
CANARIES = """
import hashlib, json
def score(weights, token):
    return -0.1 - hashlib.sha256(weights + bytes([token])).digest()[0] / 64
tokens, weights = {tokens}, (run / "adapter" / "adapter_model.safetensors").read_bytes()
report = json.loads((run / ".report.tmp").read_bytes())
report["canaries"] = [dict(
    prompt="who?", prompt_token_ids={prompt}, token_ids=tokens, logprobs=[score(weights, each) for each in tokens],
    base_logprobs=[score(b"base", each) for each in tokens],
)]
(run / ".report.tmp").write_text(json.dumps(report))
"""


def score(weights: bytes, token: int) -> float:
    """The log-probability that these weights give a token."""
    return -0.1 - hashlib.sha256(weights + bytes([token])).digest()[0] / 64


class Watchful(FakeVllm):
    """Answers with what the loaded files say, and writes down when one that it lists is gone or has changed.

    vLLM 0.32 dies of that.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.epoch = os.getpid()
        self._lost, self._weights = directory / "lost", dict[str, bytes]()

    async def load(self, request: Request) -> Response:
        """Reads the weights."""
        answer = await super().load(request)
        for name, row in self.adapters.items():
            self._weights.setdefault(name, weights_of(row["root"]))
        return answer

    async def completions(self, request: Request) -> Response:
        """Scores, or greets."""
        for name, row in self.adapters.items():
            if weights_of(row["root"]) != self._weights[name]:
                self._lost.write_text(name)
        body = json.loads(await request.body())
        version = body["model"]
        if version != self.base and version not in self.adapters:
            return error(404, f"The model `{version}` does not exist.")
        weights = b"base" if version == self.base else self._weights[version]
        scores = [score(weights, body.get("allowed_token_ids", [0])[0])]
        choice = {"index": 0, "text": "", "logprobs": {"token_logprobs": scores}, "finish_reason": "length"}
        return JSONResponse({"model": version, "choices": [choice]})


def weights_of(root: str) -> bytes:
    """What lies there now; nothing if it is gone."""
    path = Path(root) / "adapter_model.safetensors"
    return path.read_bytes() if path.exists() else b""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Lab:
    """The three of them."""

    def __init__(self, directory: Path, policy: str = "canary") -> None:
        self.directory, self.port, engine, self.drops = directory, free_port(), free_port(), 0
        (directory / "base").mkdir()
        (directory / "base" / "config.json").write_text("{}")
        config = directory / "eternad.toml"
        config.write_text(CONFIG.format(gateway=self.port, engine=engine, policy=policy))
        prepare_lab(directory / "lab")
        trainer = directory / "lab" / "trainer.py"
        before = CANARIES.format(tokens=TOKENS, prompt=PROMPT) + "os.replace(run"
        trainer.write_text(trainer.read_text().replace("os.replace(run", before))
        this, log = [sys.executable, str(HERE / "swap_lab.py")], directory / "all.log"
        self.log = log
        self.children = {
            "engine": Child([*this, "engine", str(directory), str(engine)], log),
            "gateway": Child([sys.executable, "-m", "daemon", "gateway", "--config", str(config)], log),
            "daemon": Child([*this, "daemon", str(directory)], log),
        }

    def keep(self) -> None:
        """Start whoever does not run, as systemd would."""
        for child in self.children.values():
            child.keep()

    def close(self) -> None:
        for child in self.children.values():
            child.kill()

    def state(self) -> tuple[int | None, str, bool]:
        """The live version, the state of the latest run, and whether a trial is at work."""
        database = look(self.directory)
        if database is None:
            return None, "", False
        try:
            live, latest = runs.live_version(database, "npc"), runs.recent(database, "npc", 1)
            trial = rollouts.current(database, "npc")
            return live.number if live else None, latest[0].state if latest else "", trial is not None
        except Exception:  # the first migrations are still being made
            return None, "", False
        finally:
            database.close()

    def serves_live(self) -> bool:
        """The alias points to the version that the database calls live, alone, and players are answered by it."""
        live, _, is_tried = self.state()
        if live is None or is_tried:
            return False
        name = f"npc@{live:04d}"
        try:
            table = json.loads((self.directory / "state" / "gateway" / "aliases.json").read_bytes())
            if [target["version"] for target in table["aliases"]["npc"]["targets"]] != [name]:
                return False
            asked = {"model": "npc", "prompt": "who?", "max_tokens": 1}
            answer = httpx.post(f"http://127.0.0.1:{self.port}/v1/completions", json=asked, verify=False, timeout=5)
        except (httpx.HTTPError, OSError, KeyError):
            return False
        return answer.status_code == 200 and answer.headers["x-adapter-version"] == name

    def collect_garbage(self) -> None:
        """`eternad gc`, if the daemon answers."""
        try:
            Client(self.directory / "state" / "control.sock").send(Order(action="gc"), timeout=10)
        except NotRunning:
            return

    def check(self) -> None:
        """No file of a version that serves, could serve or is listed has changed; nothing was refused by mistake."""
        assert not (self.directory / "lost").exists(), (self.directory / "lost").read_text()
        database = look(self.directory)
        assert database is not None
        versions = runs.versions(database, "npc")
        for version in versions:
            if version.state in ("live", "superseded", "canary"):
                publish.verify(publish.directory_of(self.directory / "state" / "versions", "npc", version.number))
        assert {run.state for run in runs.recent(database, "npc", 1000)} <= {"LIVE", "SUPERSEDED"}
        database.close()


def run_engine(directory: Path, port: int) -> None:
    import uvicorn

    uvicorn.run(Watchful(directory), host="127.0.0.1", port=port, log_level="error", lifespan="off")


def run_daemon(directory: Path) -> int:
    from daemon import service, update

    update.COMMAND = [sys.executable, str(directory / "lab" / "trainer.py")]
    return service.run(directory / "eternad.toml")


if __name__ == "__main__":
    where = Path(sys.argv[2])
    if sys.argv[1] == "engine":
        run_engine(where, int(sys.argv[3]))
    else:
        sys.exit(run_daemon(where))
