"""The routes that manage adapters and aliases, vLLM's where vLLM has them, and health and metrics."""

import asyncio
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.engine import Engine
from serving.generate import read_body
from serving.metrics import Metrics
from serving.refusal import Refusal
from serving.registry import ANYWHERE, Adapter

T = TypeVar("T")


class LoadBody(msgspec.Struct):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    expected_generation: str | None = None
    """Load only if the files have this generation; else 409."""
    load_inplace: bool = False


class UnloadBody(msgspec.Struct):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str
    expected_generation: str | None = None


class AliasBody(msgspec.Struct):
    """`PUT /v1/aliases/{alias}`."""

    target: str
    expected_target: str | msgspec.UnsetType | None = msgspec.UNSET
    """Flip only if the alias points there (null: nowhere yet); else 409. Left out: flip anyway."""


async def load(request: Request) -> Response:
    """Load an adapter under a new name; 400 for a name in use, 404 for a missing path, 409, 429 as `Engine.load`."""
    body = _decode(await read_body(request), LoadBody)
    if not body.lora_name or not body.lora_path:
        raise Refusal(400, "Both 'lora_name' and 'lora_path' must be provided.")
    if body.load_inplace:
        raise Refusal(400, "load_inplace is not supported: load the new version under a name of its own")
    loaded = await asyncio.to_thread(_engine(request).load, body.lora_name, body.lora_path, body.expected_generation)
    _metrics(request).loaded(loaded)
    return JSONResponse(
        {
            "message": f"Success: LoRA adapter '{body.lora_name}' added successfully.",
            **_described(loaded.adapter),
            "stage_ms": loaded.stage_ms,
            "commit_ms": loaded.commit_ms,
            "wait_ms": loaded.wait_ms,
        }
    )


async def unload(request: Request) -> Response:
    """Take an adapter's name away at once; its slot is free when its last request has ended."""
    body = _decode(await read_body(request), UnloadBody)
    adapter = await asyncio.to_thread(_engine(request).registry.unload, body.lora_name, body.expected_generation)
    _metrics(request).forget(body.lora_name)
    message = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
    return JSONResponse({"message": message, "draining": adapter.leases})


async def adapters(request: Request) -> Response:
    """`GET /v1/lora_adapters`: what lies in which slot."""
    return JSONResponse({"data": [_described(adapter) for adapter in _engine(request).registry.adapters()]})


async def models(request: Request) -> Response:
    """`GET /v1/models`: the base, the adapters (root: path, parent: base) and the aliases (parent: their target)."""
    engine = _engine(request)
    base, loaded = engine.options.served_name, engine.registry.adapters()
    rows: list[tuple[str, str, str | None]] = [(base, str(engine.options.base), None)]
    rows += [(adapter.name, adapter.path, base) for adapter in loaded if not adapter.draining]
    rows += [(alias, target, target) for alias, target in sorted(engine.registry.aliases().items())]
    data = [
        {"id": name, "object": "model", "created": 0, "owned_by": "eternad", "root": root, "parent": parent,
         "max_model_len": engine.model.context}
        for name, root, parent in rows
    ]  # fmt: skip
    return JSONResponse({"object": "list", "data": data})


async def put_alias(request: Request) -> Response:
    """Point an alias elsewhere, by compare-and-swap where `expected_target` is given."""
    alias, body = request.path_params["alias"], _decode(await read_body(request), AliasBody)
    expected = ANYWHERE if isinstance(body.expected_target, msgspec.UnsetType) else body.expected_target
    flip = await asyncio.to_thread(_engine(request).point, alias, body.target, expected)
    _metrics(request).flipped(flip)
    answer = {"alias": alias, "target": body.target, "previous": flip.previous}
    return JSONResponse(
        {**answer, "flip_ms": flip.flip_ms, "persist_ms": flip.persist_ms, "persist_error": flip.persist_error}
    )


async def delete_alias(request: Request) -> Response:
    """Forget an alias; its running requests go on."""
    await asyncio.to_thread(_engine(request).registry.drop, request.path_params["alias"])
    return Response(status_code=204)


async def aliases(request: Request) -> Response:
    """`GET /v1/aliases`: {alias: target}."""
    return JSONResponse({"aliases": _engine(request).registry.aliases()})


async def health(request: Request) -> Response:
    """`GET /health`: 200 with the epoch of this start, 503 when the model's thread is gone."""
    body = _engine(request).health()
    return JSONResponse(body, status_code=200 if body["ok"] else 503)


async def metrics(request: Request) -> Response:
    """`GET /metrics`."""
    return Response(_metrics(request).text(), media_type="text/plain; version=0.0.4")


def _described(adapter: Adapter) -> dict[str, Any]:
    return {
        "name": adapter.name, "root": adapter.path, "adapter_generation": adapter.generation, "slot": adapter.slot,
        "rank": adapter.rank, "leases": adapter.leases, "state": adapter.state(), "loaded_at": adapter.loaded_at,
    }  # fmt: skip


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"bad request body: {error}") from None


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def _metrics(request: Request) -> Metrics:
    found: Metrics = request.app.state.metrics
    return found
