"""The base model with its adapter slots: reading prompts and decoding one token for every running request."""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from serving.cache import Rows
from serving.slots import SlotBank

Dtype = Literal["auto", "float32", "bfloat16"]


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (it halves the bytes per token), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    cpu = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if cpu.startswith("AVX512") and "avx512_bf16" in flags else torch.float32


class ServedModel:
    """Weights, tokenizer, slots and cache. Only the scheduler's thread calls `read` and `decode`."""

    def __init__(
        self, base: Path, *, slots: int, max_rank: int, rows: int, context: int, dtype: Dtype, device: str
    ) -> None:
        self.device = torch.device(device)
        chosen = best_dtype(self.device) if dtype == "auto" else getattr(torch, dtype)
        offline: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(base, **offline)
        self.detokenizer = copy.deepcopy(self.tokenizer)  # for the model's thread: they are not made to be shared
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=chosen, use_safetensors=True, attn_implementation="sdpa", **offline
        )
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.dtype: torch.dtype = chosen
        config = model.config.get_text_config()
        _require_full_attention(config)
        self.context = min(context, config.max_position_embeddings)
        self.vocabulary: int = config.vocab_size
        self.rows = rows
        self.eos = _eos_ids(base, model.generation_config, self.tokenizer)
        self.bank = SlotBank(model, model.get_output_embeddings(), slots, max_rank, self.device)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        like = torch.empty(0, dtype=chosen, device=self.device)
        self.cache = Rows(config.num_hidden_layers, rows, config.num_key_value_heads, head_dim, like)

    def read(self, tokens: list[int], start: int, slot: int, *, every: bool) -> torch.Tensor:
        """Read a part of a prompt, from position `start`; logits (tokens or 1, vocabulary) in float32."""
        positions = torch.arange(start, start + len(tokens), device=self.device)[None]
        row = self.cache.reading
        return self._forward([tokens], slice(row, row + 1), positions, start + len(tokens), [slot], 0 if every else 1)[
            0
        ]

    def decode(self, tokens: list[int], positions: list[int], slots: list[int]) -> torch.Tensor:
        """One step for rows 0..n-1: their last token, its position, their slot; logits (n, vocabulary) in float32."""
        at = torch.tensor(positions, device=self.device)[:, None]
        rows = slice(0, len(tokens))
        return self._forward([[token] for token in tokens], rows, at, max(positions) + 1, slots, 1)[:, 0]

    def _forward(
        self, tokens: list[list[int]], rows: slice, positions: torch.Tensor, length: int, slots: list[int], keep: int
    ) -> torch.Tensor:
        mask = self.cache.point(rows, positions, length)
        self.bank.selection.choose(slots)
        output = self.model(
            input_ids=torch.tensor(tokens, device=self.device), attention_mask=mask, position_ids=positions,
            past_key_values=self.cache.cache, use_cache=True, logits_to_keep=keep,
        )  # fmt: skip
        logits: torch.Tensor = output.logits
        return logits.float()


def _require_full_attention(config: Any) -> None:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise SystemExit(f"eternad-serve: {config.model_type} has {sorted(layers)} layers; full attention only")


def _eos_ids(base: Path, generation: GenerationConfig | None, tokenizer: Any) -> frozenset[int]:
    stated = generation.eos_token_id if generation is not None else None
    ids = [stated] if isinstance(stated, int) else list(stated or [])
    found = frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)
    if not found:
        raise SystemExit(f"eternad-serve: {base} names no end-of-sequence token")
    return found
