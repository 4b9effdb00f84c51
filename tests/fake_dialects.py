"""The fake engine in other engines' dialects: their routes, their status codes, their traps."""

import hashlib
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
        name, sampled = body["model"], body["logit_bias"][0][0]
        if self.states.get(name) != "loaded":
            return error(400, f"{name} is not loaded")
        if sampled in self.later_bytes:
            return error(500, "The model produced output that does not match the expected Content-only format")
        if sampled in self.first_bytes:
            return JSONResponse({"content": "\ufffd"})
        weights = "base" if name == "base" or self.lies else self.confuses or self._root(name)
        rows = [{"id": token, "logprob": logprob(weights, [*body["prompt"], token])} for token in range(20)]
        own = rows[sampled if isinstance(sampled, int) else 0]
        return JSONResponse({"completion_probabilities": [{**own, "top_logprobs": rows[: body["n_probs"]]}]})

    def _root(self, name: str) -> str:
        import json

        return str(json.loads((self.preset.parent / f"{name}.json").read_text())["root"])
