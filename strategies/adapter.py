"""Base model + LoRA. All LoRA parameters are views of one flat vector, and so are their gradients.

With one vector the optimiser step, clipping, EWC's penalty, GEM's projection, swapping in other weights and a
checkpoint are each one or two kernels instead of hundreds (AdamW over 420 tensors 5.7-28 ms, over one 2.1 ms).
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, Literal, cast

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from strategies.attention import FLASH, packed
from strategies.base_model import compute_dtype, device_of, load_base
from strategies.dataset import Item
from strategies.failure import Failure
from strategies.llama import Engine, is_supported
from strategies.lora_linear import WINDOW_SHIFT, LoraGroup, LoraState, LoraWeights, draw_masks, lora_linear
from strategies.parallel.contract import Backend
from strategies.parallel.single import Single
from strategies.quantize import Quantize
from strategies.recompute import recompute_on_demand
from strategies.request import Lora, write
from strategies.token_loss import Head

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


class Adapter:
    """A base model with one trainable LoRA adapter."""

    def __init__(self, model: Any, tokenizer: Any, lora: Lora, compute_dtype: torch.dtype) -> None:
        self.model = model
        """peft's model around transformers' causal language model."""
        self.tokenizer = tokenizer
        self.lora = lora
        self.state = LoraState()
        self.names, leaves = _leaves(model)
        sizes = [leaf.numel() for leaf in leaves]
        self.flat = torch.cat([leaf.detach().float().reshape(-1) for leaf in leaves])
        """(parameters,) float32"""
        self.gradient = torch.zeros_like(self.flat)
        """(parameters,) float32"""
        self.shapes = [leaf.shape for leaf in leaves]
        self._losses: dict[bool, dict[Item, float]] = {}
        self.parameter = nn.Parameter(self.flat)
        """The same storage as `flat`, for an optimiser."""
        self.parameter.grad = self.gradient
        self._work = self.flat if compute_dtype == torch.float32 else self.flat.to(compute_dtype)
        self._spans = _spans(sizes)
        for leaf, value, slope in zip(leaves, self._views(self.flat), self._views(self.gradient), strict=True):
            leaf.data, leaf.grad = value, slope
        self._lora_of = self._take_over_forward(leaves)
        causal = model.get_base_model()
        self.decoder = getattr(causal, causal.base_model_prefix)
        """Token ids to hidden states, without the output layer."""
        for layer in getattr(self.decoder, "layers", ()):
            recompute_on_demand(layer, self.state)
        self.head = _head(causal)
        self.packs = causal.config._attn_implementation == FLASH
        """Whether the layers take sequences of any lengths in one row."""
        self._widest = max(group.A.shape[1] for group in self._lora_of.values())
        self._engine: Engine | None = None
        if getattr(causal, "is_loaded_in_4bit", False):
            self.call_layers()
        elif is_supported(causal):
            self._engine = Engine(self.decoder, self._lora_of, self.parameter)
        self.backend: Backend
        """The processes that share this run's work."""
        self.work_with(Single())

    def call_layers(self) -> None:
        """From now on compute by calling the base's own layers: their weights may lie elsewhere, or in 4 bits."""
        self._engine, self.state.by_layers = None, True

    def work_with(self, backend: Backend) -> None:
        """Share the work with other processes; before any forward pass."""
        self.backend = backend
        backend.setup(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.flat.device

    @property
    def computes(self) -> str:
        """How: precision, device and code path. Numbers of one are not bit for bit those of another."""
        way, causal = "engine" if self._engine else "layers", self.model.get_base_model()
        four = " 4-bit" if getattr(causal, "is_loaded_in_4bit", False) else ""
        return f"{self._work.dtype} {self.device.type} {way} {causal.config._attn_implementation}{four}"

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [flat[span].view(shape) for span, shape in zip(self._spans, self.shapes, strict=True)]

    def _take_over_forward(self, leaves: list[nn.Parameter]) -> dict[nn.Module, LoraWeights]:
        """Let every LoRA layer compute with the working copy and add its gradients to the flat one."""
        index = {name: place for place, name in enumerate(self.names)}
        work, slopes = self._views(self._work), self._views(self.gradient)
        layers: list[tuple[str, Any]] = [
            (name, layer)
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoraLayer) and isinstance(layer.base_layer, nn.Linear)  # a 4-bit layer is one as well
        ]
        found: dict[nn.Module, LoraWeights] = {}
        for place, (name, layer) in enumerate(layers):
            a, b = index[f"{name}.lora_A.default.weight"], index[f"{name}.lora_B.default.weight"]
            found[layer] = LoraWeights(
                A=leaves[a], B=leaves[b], work_a=work[a], work_b=work[b], gradient_a=slopes[a], gradient_b=slopes[b],
                scaling=float(layer.scaling["default"]), place=place,
            )  # fmt: skip
            layer.forward = _forward_of(layer, found[layer], self.state)
        return found

    def refresh(self) -> None:
        """Take `flat` over into the working copy; call after every change of `flat`."""
        if self._work is not self.flat:
            self._work.copy_(self.flat)
        self._losses.clear()

    def assign(self, flat: Tensor) -> None:
        """Make `flat` (parameters,) the adapter's weights; what is known of them stays known where they are these."""
        if not torch.equal(flat, self.flat):
            self.flat.copy_(flat)
            self.refresh()

    @property
    def losses(self) -> dict[Item, float]:
        """Losses already found under the present weights, with or without the adapter as it is now: until `refresh`."""
        return self._losses.setdefault(self.state.enabled, {})

    def hidden(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """(sequences, length) token ids -> (sequences * length, hidden) last hidden states.

        `lengths`: real tokens of each sequence, all by default. Padding stands at the end, so a causal model needs no
        mask: no real token ever sees it; what comes out at padding means nothing.
        """
        tokens = tokens.to(self.device)
        lengths = lengths or [tokens.shape[1]] * len(tokens)
        # who hooks into a layer sees it only where the layers themselves are called
        engine = None if any(layer._forward_hooks for layer in self._lora_of) else self._engine
        packs = engine is not None or (self.packs and min(lengths) > 0)
        width = self._widest + len(self._lora_of) * WINDOW_SHIFT
        self.state.masks = draw_masks(self.state.dropout, sum(lengths) if packs else tokens.numel(), width, self._work)
        try:
            if engine is not None:
                return engine.hidden(tokens, lengths, self.state)
            if packs:
                return packed(self.decoder, tokens, lengths)
            return torch.flatten(self.decoder(input_ids=tokens, use_cache=False).last_hidden_state, 0, 1)
        finally:
            self.state.masks = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model alone."""
        self.state.enabled = False
        try:
            yield
        finally:
            self.state.enabled = True

    @contextmanager
    def holding(self, flat: Tensor) -> Iterator[None]:
        """Other weights for a while."""
        own = self.flat.clone()
        self.assign(flat)
        try:
            yield
        finally:
            self.assign(own)

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """With the configured dropout: what training does, and nothing else."""
        self.state.dropout = self.lora.dropout
        try:
            yield
        finally:
            self.state.dropout = 0.0

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Without dropout, wherever the caller is."""
        dropout, self.state.dropout = self.state.dropout, 0.0
        try:
            yield
        finally:
            self.state.dropout = dropout

    @contextmanager
    def own_gradient(self) -> Iterator[Tensor]:
        """An empty gradient for a while; the accumulated one comes back afterwards."""
        kept = self.gradient.clone()
        self.gradient.zero_()
        try:
            yield self.gradient
        finally:
            self.gradient.copy_(kept)

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return bool(self.flat.isfinite().all())

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names of peft's files."""
        names = [name.replace(".default.", ".") for name in self.names]
        return {name: view.clone() for name, view in zip(names, self._views(self.flat), strict=True)}

    def save(self, directory: Path) -> None:
        """Write peft's two files, as stock peft, vLLM and others load them; fsynced."""
        directory.mkdir(parents=True, exist_ok=True)
        config = self.model.peft_config["default"]
        fields = {**config.to_dict(), "inference_mode": True, "target_modules": sorted(config.target_modules)}
        write(directory / CONFIG_FILE, fields)
        safetensors.torch.save_file(self.tensors(), directory / WEIGHTS_FILE, metadata={"format": "pt"})
        for path in (directory / WEIGHTS_FILE, directory):
            _sync(path)

    def load(self, directory: Path) -> None:
        """Take over the weights of a version; raises `Failure` where it does not fit this base and rank."""
        try:
            found = safetensors.torch.load_file(directory / WEIGHTS_FILE)
        except (OSError, safetensors.SafetensorError) as error:
            raise Failure("parent_unreadable", f"cannot read the parent version's {WEIGHTS_FILE}: {error}") from error
        self.assign(self._flatten(found))

    def _flatten(self, found: Mapping[str, Tensor]) -> Tensor:
        names = [name.replace(".default.", ".") for name in self.names]
        wrong = [
            name
            for name, shape in zip(names, self.shapes, strict=True)
            if name not in found or found[name].shape != shape
        ]
        if wrong or len(found) != len(names):
            raise Failure(
                "parent_mismatch",
                f"the parent version's adapter has {len(found)} tensors, this run's LoRA settings give {len(names)}, "
                f"and {len(wrong)} differ in name or shape ({', '.join(wrong[:3])}); keep rank and targets, or rebase",
            )
        return torch.cat([found[name].float().reshape(-1) for name in names])


def _forward_of(layer: Any, weights: LoraWeights, state: LoraState) -> Any:
    base = cast(nn.Linear, layer.base_layer)

    group = LoraGroup((weights,), (slice(None),))

    def forward(_: nn.Module, x: Tensor, *__: Any, **___: Any) -> Tensor:
        return lora_linear(x, base, group, state)

    return MethodType(forward, layer)


SIDE_BY_SIDE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers with one input, in the order in which their weights are stacked."""


def _leaves(model: Any) -> tuple[list[str], list[nn.Parameter]]:
    """Names and LoRA parameters in the order of the flat vector: A of layers with one input side by side."""
    named = sorted(
        ((name, leaf) for name, leaf in model.named_parameters() if leaf.requires_grad), key=lambda it: _order(it[0])
    )
    return [name for name, _ in named], [leaf for _, leaf in named]


def _order(name: str) -> tuple[object, ...]:
    *path, module, part, _, _ = name.split(".")
    if module not in SIDE_BY_SIDE:
        return (*_numbered(path), 1, module, part, 0)
    return (*_numbered(path), 0, "", part, SIDE_BY_SIDE.index(module))


def _numbered(path: list[str]) -> list[tuple[int, str]]:
    """Sorts `layers.10` behind `layers.9`."""
    return [(int(step), "") if step.isdigit() else (-1, step) for step in path]


def _spans(sizes: list[int]) -> list[slice]:
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _head(causal: Any) -> Head:
    """The output layer with what some families do to the logits (Cohere, Granite: scaled; Gemma: capped)."""
    config = causal.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(causal.get_output_embeddings().weight, scale, getattr(config, "final_logit_softcapping", None) or 0.0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_adapter(
    base_path: Path,
    lora: Lora,
    *,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    seed: int = 0,
    quantize: Quantize = "none",
) -> Adapter:
    """Load the base model from a local directory and put a fresh adapter on it; B = 0, so it answers like the base."""
    place = device_of(device)
    dtype = compute_dtype(precision, place)
    model, tokenizer = load_base(base_path, dtype, place, quantize)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        # engines read an integer where it is one
        lora_alpha=cast(int, int(lora.alpha) if lora.alpha.is_integer() else lora.alpha),
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
        target_modules="all-linear" if lora.targets == ["all-linear"] else list(lora.targets),
    )
    try:
        with warnings.catch_warnings():  # peft asks transformers for a property by its old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:  # peft names the modules that it looked for
        raise Failure("bad_targets", f"LoRA targets {lora.targets} do not fit the base model: {error}") from error
    config.base_model_name_or_path = str(base_path)
    return Adapter(wrapped, tokenizer, lora, dtype)
