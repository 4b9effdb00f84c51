"""What the serving and engine tests share: random adapters of the tiny model, and servers in threads and processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from safetensors.numpy import save_file
from starlette.types import ASGIApp

ROOT = Path(__file__).resolve().parent.parent
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, directory: Path, *, seed: int, rank: int = 4, alpha: float = 8.0, **config: Any) -> Path:
    """A random adapter (B too, so that it changes what the model says) of a Llama, as PEFT saves it.

    Written without torch and PEFT, whose imports take seconds; `peft_scores` proves that PEFT reads it.
    """
    shape = json.loads((base / "config.json").read_bytes())
    size, middle = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim") or size // shape["num_attention_heads"]
    q, kv = head * shape["num_attention_heads"], head * shape["num_key_value_heads"]
    sizes = {"self_attn.q_proj": (size, q), "self_attn.k_proj": (size, kv), "self_attn.v_proj": (size, kv),
             "self_attn.o_proj": (q, size), "mlp.gate_proj": (size, middle), "mlp.up_proj": (size, middle),
             "mlp.down_proj": (middle, size)}  # fmt: skip
    draw, tensors, ranks = np.random.default_rng(seed), {}, config.get("rank_pattern", {})
    for layer in range(shape["num_hidden_layers"]):
        for module, (inputs, outputs) in sizes.items():
            key, r = f"base_model.model.model.layers.{layer}.{module}", ranks.get(module.split(".")[1], rank)
            tensors[f"{key}.lora_A.weight"] = draw.normal(0, 0.3, (r, inputs)).astype("f4")
            tensors[f"{key}.lora_B.weight"] = draw.normal(0, 0.3, (outputs, r)).astype("f4")
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": LINEAR, "r": rank,
                "lora_alpha": alpha, "base_model_name_or_path": str(base), **config}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def peft_scores(base: Path, adapter: Path | None, ids: list[int]) -> list[float]:
    """Log-probability of each token but the first under PEFT's own forward pass (None: the base's), float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return [scores[at, token].item() for at, token in enumerate(ids[1:])]


def add_manifest(directory: Path) -> None:
    """`manifest.json` with the SHA-256 of every file, as a published version has."""
    import hashlib

    files = {file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in directory.iterdir()}
    (directory / "manifest.json").write_text(json.dumps({"files": files}))


@contextlib.contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """Run an application in a thread of this process; its URL."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio: only then NODELAY
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)  # a request that comes before the server has begun waits instead of being refused
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


class EngineProcess:
    """`python -m serving` as a child."""

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None, waits: bool = True) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "serving", "--port", str(self.port), *map(str, arguments)]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        if waits:
            self.start()
        else:
            self._spawn()

    def _spawn(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=ROOT, env=self._environment)

    def start(self) -> None:
        """Start and wait until it answers."""
        self._spawn()
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(self.url + "/health")
                return
            if self.process.poll() is not None:
                raise RuntimeError(f"the engine ended with {self.process.returncode}")
            time.sleep(0.1)
        raise TimeoutError(self.url)

    def kill(self) -> None:
        """SIGKILL: no chance to write anything."""
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)
