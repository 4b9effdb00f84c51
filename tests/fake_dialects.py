"""The fake engine in other engines' dialects: their routes, their status codes, their traps."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fake_engine import FakeEngine, error, logprob
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

LIKELY = -0.1


class FakeVllm(FakeEngine):
    """vLLM 0.32: no aliases, no generations, 500 for an adapter that it cannot read."""

    def routes(self) -> list[Route]:
        """Of its OpenAI server."""
        return [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    async def metrics(self, _: Request) -> Response:
        """When the process started, among others."""
        return PlainTextResponse(f"# TYPE x gauge\nprocess_start_time_seconds 1.7953896{self.epoch}e+09\n")

    async def health(self, _: Request) -> Response:
        """200 without a body."""
        return Response()

    async def models(self, _: Request) -> Response:
        """The base, and an adapter with root and parent."""
        rows: list[dict[str, Any]] = [{"id": self.base, "root": "/models/base", "parent": None}]
        rows += [{"id": name, "root": row["root"], "parent": self.base} for name, row in self.adapters.items()]
        return JSONResponse({"object": "list", "data": rows})

    async def completions(self, request: Request) -> Response:
        """One token, forced perhaps, scored as if it were not; scoring a prompt ends the process, as it may."""
        body = await request.json()
        version = body["model"]
        if version != self.base and version not in self.adapters:
            return error(404, f"The model `{version}` does not exist.")
        if body.get("echo"):
            self.restart()
            return error(500, "EngineCore encountered an issue.")
        weights = "base" if version == self.base or self.lies else self.confuses or self.adapters[version]["root"]
        scores = [logprob(weights, [*body["prompt"], *body.get("allowed_token_ids", [0])])]
        choice = {"index": 0, "text": "", "logprobs": {"token_logprobs": scores}, "finish_reason": "length"}
        return JSONResponse({"model": version, "choices": [choice]})

    async def load(self, request: Request) -> Response:
        """Text, not JSON; 500 for a torn file."""
        path = Path((await request.json())["lora_path"])
        if (path / "torn").exists():
            return error(500, "Error loading lora")
        answer = await super().load(request)
        return PlainTextResponse("Success: LoRA adapter added successfully.") if answer.status_code == 200 else answer


class FakeVllmShaped(FakeVllm):
    """As much of vLLM as many servers copy: no metrics, no scores of given tokens, no parents in the list."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, list[int]] = {}
        self.hides_paths = False

    def routes(self) -> list[Route]:
        """Load, unload, list, chat."""
        left_out = ("/metrics", "/v1/completions")
        chat = Route("/v1/chat/completions", self.chat, methods=["POST"])
        return [*(route for route in super().routes() if route.path not in left_out), chat]

    async def models(self, _: Request) -> Response:
        """Names, and perhaps paths."""
        rows = [{"id": self.base}, *({"id": name, "root": row["root"]} for name, row in self.adapters.items())]
        return JSONResponse({"data": [{"id": row["id"]} for row in rows] if self.hides_paths else rows})

    async def chat(self, request: Request) -> Response:
        """The canary's answer, scored by whoever answers."""
        body = await request.json()
        name = body["model"]
        if name != self.base and name not in self.adapters:
            return error(404, f"The model `{name}` does not exist.")
        weights = "base" if name == self.base or self.lies else self.confuses or self.adapters[name]["root"]
        choices = [greedy(weights, self.answers[body["messages"][0]["content"]])]
        return JSONResponse({"model": name, "choices": choices})


class FakeSglang(FakeVllm):
    """SGLang 0.5: other routes, `/generate` for scores, 400 with `error_message`."""

    def routes(self) -> list[Route]:
        """Of its HTTP server."""
        return [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/load_lora_adapter", self.load, methods=["POST"]),
            Route("/unload_lora_adapter", self.unload, methods=["POST"]),
            Route("/generate", self.generate, methods=["POST"]),
        ]

    async def load(self, request: Request) -> Response:
        """Failures are 400."""
        answer = await super().load(request)
        if answer.status_code == 200:
            return JSONResponse({"success": True, "error_message": ""})
        return JSONResponse({"success": False, "error_message": "Failed to load LoRA adapter"}, 400)

    async def generate(self, request: Request) -> Response:
        """Scores of the prompt, as (log-probability, token, text)."""
        body = await request.json()
        name, ids = body["lora_path"], body["input_ids"]
        if name is not None and name not in self.adapters:
            return error(400, f"{name} is not loaded")
        weights = self.confuses or ("base" if name is None or self.lies else self.adapters[name]["root"])
        if name is None:
            weights = "base"
        rows = [[None, ids[0], None], *([logprob(weights, ids[: n + 1]), ids[n], None] for n in range(1, len(ids)))]
        return JSONResponse({"text": "", "meta_info": {"input_token_logprobs": rows}})


class FakeMistral(FakeEngine):
    """mistral.rs: a listing with generations and leases, 409 and 422 for 400 and 500, greedy answers only."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, list[int]] = {}
        self.hides_paths = False

    def routes(self) -> list[Route]:
        """Of its server with runtime updating."""
        return [
            Route("/health", self.health),
            Route("/v1/lora_adapters", self.listing),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def listing(self, _: Request) -> Response:
        """What is loaded, and which generations are resident."""
        rows = [self._row(row) for row in self.adapters.values()]
        resident = [
            {"generation": row["generation"], "aliases": [row["id"]], "active_leases": 2, "retired": False}
            for row in rows
        ]
        return JSONResponse({"object": "list", "data": rows, "generations": resident, "max_adapters": self.slots})

    async def load(self, request: Request) -> Response:
        """Its own codes: 409 for a name in use and for full slots, 422 for unfit files."""
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        if not path.is_dir():
            return error(404, f"failed to access adapter directory `{path}`")
        if (path / "torn").exists():
            return error(422, "invalid LoRA adapter")
        if name in self.adapters or len(self.adapters) >= self.slots:
            return error(409, f"`{name}` is already loaded, or there are too many")
        self.adapters[name] = {"name": name, "root": str(path)}
        return JSONResponse(self._row(self.adapters[name]))

    async def chat(self, request: Request) -> Response:
        """The canary's answer, scored by whoever answers."""
        body = await request.json()
        name = body["model"]
        if name != "default" and name not in self.adapters:
            return error(404, f"no model {name}")
        weights = "base" if name == "default" or self.lies else self.confuses or self.adapters[name]["root"]
        return JSONResponse({"choices": [greedy(weights, self.answers[body["messages"][0]["content"]])]})

    def _row(self, adapter: dict[str, Any]) -> dict[str, Any]:
        source = {} if self.hides_paths else {"source": adapter["root"]}
        generation = hashlib.sha256(adapter["root"].encode()).hexdigest()
        return {"id": adapter["name"], "object": "lora_adapter", "generation": generation, "rank": 4, **source}


def greedy(weights: str, tokens: list[int]) -> dict[str, Any]:
    """A choice of a chat answer: these tokens, scored by `weights`."""
    ids = [1, 2, 3]
    scores = [{"token": str(token), "logprob": logprob(weights, [*ids, *tokens[: at + 1]])}
              for at, token in enumerate(tokens)]  # fmt: skip
    return {"logprobs": {"content": scores}}


class FakeLorax(FakeEngine):
    """LoRAX: an adapter is its path, in every request; scores only what it generates."""

    def __init__(self) -> None:
        super().__init__(slots=100)
        self.answers: dict[str, list[int]] = {}

    def routes(self) -> list[Route]:
        """Of its server."""
        return [
            Route("/health", self.health),
            Route("/generate", self.warm, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def warm(self, request: Request) -> Response:
        """Reads the adapter."""
        path = (await request.json())["parameters"]["adapter_id"]
        return JSONResponse({"generated_text": "-"}) if Path(path).is_dir() else error(424, f"no {path}")

    async def chat(self, request: Request) -> Response:
        """The canary's answer, scored by whoever answers."""
        body = await request.json()
        weights = self.confuses or ("base" if self.lies or not body["model"] else body["model"])
        if not body["model"]:
            weights = "base"
        return JSONResponse({"choices": [greedy(weights, self.answers[body["messages"][0]["content"]])]})


class FakeLlamaServer(FakeEngine):
    """llama-server as a router: models are sections of a preset file, read again on request."""

    def __init__(self, preset: Path) -> None:
        super().__init__()
        self.preset = preset
        self.sections: dict[str, str] = {}
        self.states: dict[str, str] = {"base": "loaded"}
        self.first_bytes, self.later_bytes = {8}, {9}

    def routes(self) -> list[Route]:
        """Of the router."""
        return [
            Route("/health", self.health),
            Route("/models", self.models),
            Route("/models/load", self.load, methods=["POST"]),
            Route("/models/unload", self.stop, methods=["POST"]),
            Route("/completion", self.complete, methods=["POST"]),
        ]

    def restart(self, *, keeps_aliases: bool = False) -> None:
        """All models are unloaded; the preset file is still there."""
        self.states = dict.fromkeys(self.states, "unloaded") | {"base": "loaded"}

    def forget(self, name: str) -> None:
        """Its process has ended."""
        self.states[name] = "unloaded"

    async def models(self, request: Request) -> Response:
        """The sections and their states; it forgets what is no longer in the file only when it reads it again."""
        if request.query_params.get("reload"):
            parts = re.findall(r"^\[(.+)\]\n((?:(?!\[).*\n?)*)", self.preset.read_text(), re.MULTILINE)
            self.sections = dict(parts)
            self.states = {name: self.states.get(name, "unloaded") for name in self.sections}
        rows = [
            {"id": name, "status": {"value": state, "failed": state == "failed"}} for name, state in self.states.items()
        ]
        return JSONResponse({"data": rows})

    async def load(self, request: Request) -> Response:
        """At once, unless the adapter is no GGUF."""
        name = (await request.json())["model"]
        if name not in self.sections:
            return error(404, f"no {name}")
        file = re.search(r"^lora = (.+)$", self.sections[name], re.MULTILINE)
        self.states[name] = "loaded" if file and Path(file[1]).read_bytes()[:4] == b"GGUF" else "failed"
        return JSONResponse({"success": True})

    async def stop(self, request: Request) -> Response:
        """Gone."""
        self.states[(await request.json())["model"]] = "unloaded"
        return JSONResponse({"success": True})

    async def complete(self, request: Request) -> Response:
        """Samples what the bias says; a first byte of a character is not reported, a later one is a 500."""
        body = await request.json()
        root, sampled = self._answering(body), body["logit_bias"][0][0]
        if root is None:
            return error(400, f"{body['model']} is not loaded")
        if sampled in self.later_bytes:
            return error(500, "The model produced output that does not match the expected Content-only format")
        if sampled in self.first_bytes:
            return JSONResponse({"content": "\ufffd"})
        weights = "base" if not root or self.lies else self.confuses or root
        rows = [{"id": token, "logprob": logprob(weights, [*body["prompt"], token])} for token in range(20)]
        own = rows[sampled if isinstance(sampled, int) else 0]
        return JSONResponse({"completion_probabilities": [{**own, "top_logprobs": rows[: body["n_probs"]]}]})

    def _answering(self, body: dict[str, Any]) -> str | None:
        """An adapter's root, nothing for the base, None for what is not loaded."""
        name = body["model"]
        if self.states.get(name) != "loaded":
            return None
        return "" if name == "base" else self._root(name)

    def _root(self, name: str) -> str:
        return str(json.loads((self.preset.parent / f"{name}.json").read_text())["root"])


class FakeLlamaScales(FakeLlamaServer):
    """llama-server with `--lora-scaled`: adapters are files that are read at its start, a request says which scales.

    Whoever watches the files (systemd) starts it again when one has changed.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "none")
        self.files = [directory / f"slot-{number}.gguf" for number in range(3)]
        self.read: dict[Path, tuple[int, str]] = {}
        self.is_watched = True

    def routes(self) -> list[Route]:
        """Of the server."""
        return [
            Route("/health", self.health),
            Route("/lora-adapters", self.slots_of),
            Route("/completion", self.complete, methods=["POST"]),
        ]

    def restart(self, *, keeps_aliases: bool = False) -> None:
        """Reads its files again; nothing is forgotten but what was unloaded."""
        self.read = {file: (file.stat().st_mtime_ns, label_of(file)) for file in self.files}

    def forget(self, name: str) -> None:
        """Somebody has started it without its files, and again with them."""
        self.read = {}

    async def slots_of(self, _: Request) -> Response:
        """Ids, paths, and the labels that stood in the files when they were read."""
        if self.is_watched and any(self.read.get(file, (0,))[0] != file.stat().st_mtime_ns for file in self.files):
            self.restart()
        rows = enumerate(self.read.items())
        return JSONResponse(
            [{"id": at, "path": str(file), "scale": 0.0, "task_name": label} for at, (file, (_, label)) in rows]
        )

    def _answering(self, body: dict[str, Any]) -> str | None:
        """An adapter's root; nothing for the base."""
        labels = [label for _, label in self.read.values()]
        used = [labels[each["id"]] for each in body["lora"] if each["scale"]]
        return used[0].split(" ", 1)[1] if used else ""


def label_of(file: Path) -> str:
    """`adapter.lora.task_name` of a GGUF file, or nothing."""
    from gguf import GGUFReader

    found = GGUFReader(file).fields.get("adapter.lora.task_name")
    return str(found.contents()) if found else ""
