"""A faithful, scriptable engine without a model: the embedded engine's routes, and every way in which one can fail.

Its "log-probabilities" are a hash of (what answers, tokens so far), so that each version and the base have a
fingerprint of their own. Scripts: `delay_seconds`, `failures` (statuses for the coming requests to a path), `lies` (a
load says 200, the base answers), `confuses` (answers with another version), `restart` (forgets like a real one) and
`forget` (loses one adapter and goes on).
"""

import asyncio
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from strategies.request import Canary

PROMPT = [1, 2, 3]


def logprob(weights: str, tokens: list[int]) -> float:
    """What `weights` (a path, or `base`) give the last of the tokens."""
    digest = hashlib.sha256(f"{weights}/{tokens}".encode()).digest()
    return -0.1 - digest[0] / 64


def canary(path: Path, seed: int = 0) -> Canary:
    """What a trainer would say about the adapter at `path`."""
    tokens = [7 + seed, 8, 9, 10]
    upto = [[*PROMPT, *tokens[: n + 1]] for n in range(len(tokens))]
    return Canary(
        prompt="who are you?", prompt_token_ids=PROMPT, token_ids=tokens,
        logprobs=[logprob(str(path), ids) for ids in upto], base_logprobs=[logprob("base", ids) for ids in upto],
    )  # fmt: skip


class FakeEngine:
    """An ASGI application; its attributes are its script."""

    def __init__(self, slots: int = 3, base: str = "base") -> None:
        self.slots, self.base = slots, base
        self.epoch = 0
        self.delay_seconds = 0.0
        self.failures: dict[str, list[int]] = {}
        self.lies = False
        self.confuses: str | None = None
        self.adapters: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, str] = {}
        self.seen: list[str] = []
        self._clock = itertools.count()
        self._app = Starlette(routes=self.routes())

    def routes(self) -> list[Route]:
        """As the embedded engine has them."""
        return [
            Route("/health", self.health),
            Route("/v1/lora_adapters", self.listing),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            Route("/v1/aliases", self.alias_table),
            Route("/v1/aliases/{alias}", self.put_alias, methods=["PUT"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The scripted trouble, then the route."""
        if scope["type"] == "http":
            self.seen.append(f"{scope['method']} {scope['path']}")
            await asyncio.sleep(self.delay_seconds)
            if self.failures.get(scope["path"]):
                status = self.failures[scope["path"]].pop(0)
                headers = {"Retry-After": "0"} if status == 429 else None
                await error(status, f"scripted {status}", headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def restart(self, *, keeps_aliases: bool = False) -> None:
        """A new process: nothing loaded, another epoch."""
        self.epoch += 1
        self.adapters.clear()
        if not keeps_aliases:
            self.aliases.clear()

    def forget(self, name: str) -> None:
        """Lose one adapter without a word."""
        self.adapters.pop(name, None)

    async def health(self, _: Request) -> Response:
        """Alive."""
        return JSONResponse({"ok": True, "epoch": str(self.epoch), "base": self.base, "slots": self.slots})

    async def listing(self, _: Request) -> Response:
        """What is loaded."""
        return JSONResponse({"data": list(self.adapters.values())})

    async def load(self, request: Request) -> Response:
        """vLLM's semantics, and the embedded engine's generation."""
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not path.is_dir():
            return error(404, f"no adapter found: {path}")
        if len(self.adapters) >= self.slots:
            return error(409, "no free slot")
        generation = hashlib.sha256(str(path).encode()).hexdigest()
        if body.get("expected_generation") not in (None, generation):
            return error(409, "another generation")
        self.adapters[name] = {
            "name": name, "root": str(path), "adapter_generation": generation, "state": "loaded", "leases": 0,
            "loaded_at": next(self._clock),
        }  # fmt: skip
        return JSONResponse({**self.adapters[name], "stage_ms": 2.0, "commit_ms": 1.0})

    async def unload(self, request: Request) -> Response:
        """Gone at once."""
        name = (await request.json())["lora_name"]
        if name in self.aliases.values():
            return error(409, f"an alias points to {name}")
        found = self.adapters.pop(name, None)
        return JSONResponse({"draining": 0}) if found else error(404, f"no {name}")

    async def alias_table(self, _: Request) -> Response:
        """All aliases."""
        return JSONResponse({"aliases": self.aliases})

    async def put_alias(self, request: Request) -> Response:
        """Compare and swap."""
        alias, body = request.path_params["alias"], await request.json()
        previous = self.aliases.get(alias)
        if "expected_target" in body and body["expected_target"] != previous:
            return error(409, f"alias points to {previous}")
        if body["target"] != self.base and body["target"] not in self.adapters:
            return error(404, f"no {body['target']}")
        self.aliases[alias] = body["target"]
        return JSONResponse({"previous": previous, "flip_ms": 0.01, "persist_ms": 0.1})

    async def completions(self, request: Request) -> Response:
        """Scores a prompt of token ids."""
        body = json.loads(await request.body())
        version = self.aliases.get(body["model"], body["model"])
        if version != self.base and version not in self.adapters:
            return error(404, f"The model `{body['model']}` does not exist.")
        weights = "base" if version == self.base or self.lies else self.adapters[version]["root"]
        if self.confuses and version != self.base:
            weights = self.confuses
        prompt = body["prompt"]
        scores = [None, *(logprob(weights, prompt[: n + 1]) for n in range(1, len(prompt)))]
        choice = {"index": 0, "text": "", "logprobs": {"token_logprobs": scores}, "finish_reason": "length"}
        return JSONResponse({"model": version, "choices": [choice]}, headers={"X-Adapter-Version": version})


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """OpenAI's shape."""
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers=headers)
