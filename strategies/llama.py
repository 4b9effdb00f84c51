"""A hand-written forward and backward pass for decoders of Llama's shape, on CPUs.

The same numbers as transformers + peft (the tests hold it to that), with fewer and larger operations:

- q, k, v and gate, up share their input: one product each with the fused frozen weight, one with the stacked A;
- the frozen weights get no gradient, and nothing of autograd's bookkeeping is kept: per layer only what the backward
  pass reads;
- sequences lie one after other without padding; only attention knows where one ends (`strategies.llama_attention`);
- what all sequences of a pass begin with is computed once (`strategies.prefix`).

Shapes: x: (tokens, hidden).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strategies.attention import real_places
from strategies.llama_attention import Attended, Attention, Rotation, Run
from strategies.lora_linear import LoraGroup, LoraState, LoraWeights, Masks
from strategies.prefix import Prefix, common_prefix

SUPPORTED = ("llama", "mistral", "qwen2")


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Linear layers with one input: their frozen weights stacked, their adapters."""

    weight: Tensor
    """(sum of outputs, inputs)"""
    bias: Tensor | None
    lora: LoraGroup | None

    def forward(self, x: Tensor, masks: Masks | None, enabled: bool) -> tuple[Tensor, Tensor | None]:
        """(tokens, sum of outputs), and z for the backward pass."""
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        return y, self.lora.add_forward(x, y, masks) if enabled and self.lora else None

    def backward(self, dy: Tensor, x: Tensor, z: Tensor | None, masks: Masks | None) -> Tensor:
        """(tokens, inputs) dx; the adapters' gradients are added to the flat one."""
        dx = dy @ self.weight
        if self.lora is not None and z is not None:
            self.lora.add_backward(x, z, dy, dx, masks)
        return dx

    def is_trained(self) -> bool:
        """Whether any adapter of the group asks for a gradient."""
        return self.lora is not None and any(member.A.requires_grad for member in self.lora.members)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One decoder layer."""

    norm_in: Tensor
    qkv: Group
    out: Group
    norm_mlp: Tensor
    gate_up: Group
    down: Group

    def is_trained(self) -> bool:
        """Whether any adapter of the layer asks for a gradient."""
        return any(group.is_trained() for group in (self.qkv, self.out, self.gate_up, self.down))


class Kept(NamedTuple):
    """What the backward pass of one layer reads."""

    x: Tensor
    attended: list[Attended]
    mixed: Tensor
    """(tokens, heads * head size) attention's answer, before the output layer"""
    middle: Tensor
    """(tokens, hidden) after attention"""
    gate_up: Tensor
    """(tokens, 2 * inner)"""
    active: Tensor
    """(tokens, inner) silu(gate)"""
    zs: tuple[Tensor | None, ...]
    """z = x A^T of qkv, out, gate_up, down"""


def is_supported(causal: Any) -> bool:
    """Whether `causal` computes exactly what this module computes."""
    config = causal.config
    return (
        config.model_type in SUPPORTED
        and config.hidden_act == "silu"
        and causal.device.type == "cpu"
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
        and not getattr(config, "attention_dropout", 0.0)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What is the same for all layers of one forward and backward pass."""

    runs: list[Run]
    rotation: Rotation
    masks: Masks | None
    enabled: bool
    shared: Prefix | None


class Engine:
    """The decoder of one model with its adapter."""

    def __init__(self, decoder: Any, lora_of: Mapping[nn.Module, LoraWeights], leaf: nn.Parameter) -> None:
        self.decoder = decoder
        self.leaf = leaf
        """Any parameter that asks for a gradient: it makes autograd call the backward pass."""
        config, attention = decoder.config, decoder.layers[0].self_attn
        self.attention = Attention(
            config.num_attention_heads, config.num_key_value_heads, attention.head_dim, attention.scaling
        )
        self.epsilon = config.rms_norm_eps
        self.blocks = [_block(layer, lora_of) for layer in decoder.layers]

    def hidden(self, tokens: Tensor, lengths: Sequence[int], state: LoraState) -> Tensor:
        """(sequences, length) padded token ids -> (sequences * length, hidden) last hidden states, 0 at padding."""
        # autograd asks whether the leaf wants a gradient, not whether anybody will: without one nothing is to be kept
        leaf = self.leaf if torch.is_grad_enabled() else self.leaf.detach()
        return _Decode.apply(leaf, self, tokens, lengths, state)

    def forward(
        self, tokens: Tensor, lengths: Sequence[int], state: LoraState, keep: bool
    ) -> tuple[Tensor, Tensor, list[Kept | Tensor], Pass]:
        """Normed and raw last hidden states, what the backward pass reads of the trained layers, the pass itself.

        tokens: (tokens,) of all sequences, one after other. Where layers are recomputed, all that is kept of one is its
        input (tokens, hidden).
        """
        positions = torch.cat([torch.arange(length) for length in lengths])
        masks, shared = state.masks, common_prefix(tokens, lengths)
        if shared is not None:
            tokens, positions = tokens[shared.chosen], shared.positions
            masks = None if masks is None else masks.first(len(tokens))
        x = self.decoder.embed_tokens(tokens)
        runs = self.attention.layout(lengths, x.dtype, shared)
        now = Pass(runs, self._rotation(x, positions), masks, state.enabled, shared)
        trained = [place for place, block in enumerate(self.blocks) if block.is_trained()]
        lowest = trained[0] if trained and keep else len(self.blocks)
        kept: list[Kept | Tensor] = []
        for place, block in enumerate(self.blocks):
            before = x
            x, layer = self._layer_forward(block, x, now)
            if place >= lowest:
                kept.append(before if state.recomputes else layer)
        normed = self._norm(x, self.decoder.norm.weight)
        return normed if shared is None else normed[shared.places], x, kept, now

    def backward(self, gradient: Tensor, last: Tensor, kept: list[Kept | Tensor], now: Pass) -> None:
        """Add every trained adapter's gradient to the flat one; consumes `kept`: nothing lies below its first layer."""
        if now.shared is not None:  # what several sequences ask of a common token adds up
            gradient = gradient.new_zeros(last.shape).index_add_(0, now.shared.places, gradient)
        dx = _norm_backward(gradient, last, self.decoder.norm.weight, self.epsilon)
        for block in reversed(self.blocks[-len(kept) :]):
            layer = kept.pop()
            if isinstance(layer, Tensor):
                layer = self._layer_forward(block, layer, now)[1]
            dx = self._layer_backward(block, dx, layer, now)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, self.epsilon)

    def _rotation(self, x: Tensor, positions: Tensor) -> Rotation:
        cosine, sine = self.decoder.rotary_emb(x[None], positions[None])
        half = self.attention.head_size // 2
        return Rotation(cosine[0, :, None, :half].contiguous(), sine[0, :, None, :half].contiguous())

    def _layer_forward(self, block: Block, x: Tensor, now: Pass) -> tuple[Tensor, Kept]:
        qkv, z_qkv = block.qkv.forward(self._norm(x, block.norm_in), now.masks, now.enabled)
        mixed, attended = self.attention.forward(qkv, now.runs, now.rotation)
        middle, z_out = block.out.forward(mixed, now.masks, now.enabled)
        middle.add_(x)
        gate_up, z_gate_up = block.gate_up.forward(self._norm(middle, block.norm_mlp), now.masks, now.enabled)
        gate, up = gate_up.chunk(2, dim=1)
        active = torch.nn.functional.silu(gate)
        output, z_down = block.down.forward(active * up, now.masks, now.enabled)
        return output.add_(middle), Kept(x, attended, mixed, middle, gate_up, active, (z_qkv, z_out, z_gate_up, z_down))

    def _layer_backward(self, block: Block, dy: Tensor, kept: Kept, now: Pass) -> Tensor:
        z_qkv, z_out, z_gate_up, z_down = kept.zs
        gate, up = kept.gate_up.chunk(2, dim=1)
        dinner = block.down.backward(dy, kept.active * up, z_down, now.masks)
        dgate_up = torch.empty_like(kept.gate_up)
        dgate, dup = dgate_up.chunk(2, dim=1)
        torch.mul(dinner, kept.active, out=dup)
        torch.ops.aten.silu_backward.grad_input(dinner.mul_(up), gate, grad_input=dgate)
        dnormed = block.gate_up.backward(dgate_up, self._norm(kept.middle, block.norm_mlp), z_gate_up, now.masks)
        dmiddle = _norm_backward(dnormed, kept.middle, block.norm_mlp, self.epsilon).add_(dy)
        dmixed = block.out.backward(dmiddle, kept.mixed, z_out, now.masks)
        dqkv = self.attention.backward(dmixed, kept.attended, now.runs, now.rotation)
        dnormed = block.qkv.backward(dqkv, self._norm(kept.x, block.norm_in), z_qkv, now.masks)
        return _norm_backward(dnormed, kept.x, block.norm_in, self.epsilon).add_(dmiddle)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        leaf: Tensor,  # noqa: ARG004 - asks for a gradient
        engine: Engine,
        tokens: Tensor,
        lengths: Sequence[int],
        state: LoraState,
    ) -> Tensor:
        real = real_places(tokens.shape, lengths)
        keep = ctx.needs_input_grad[0] and state.enabled
        hidden, *ctx.kept = engine.forward(tokens.flatten()[real], lengths, state, keep)
        ctx.engine, ctx.real = engine, real
        padded = hidden.new_zeros(tokens.numel(), hidden.shape[1]).index_copy_(0, real, hidden)
        if not keep:
            ctx.mark_non_differentiable(padded)
        return padded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None, None]:
        last, kept, now = ctx.kept
        if not kept:
            raise RuntimeError("a forward pass can be differentiated once, and only above a trained layer")
        ctx.engine.backward(gradients[0][ctx.real], last, kept, now)
        return None, None, None, None, None


def _block(layer: Any, lora_of: Mapping[nn.Module, LoraWeights]) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        norm_in=layer.input_layernorm.weight,
        qkv=_group([attention.q_proj, attention.k_proj, attention.v_proj], lora_of),
        out=_group([attention.o_proj], lora_of),
        norm_mlp=layer.post_attention_layernorm.weight,
        gate_up=_group([mlp.gate_proj, mlp.up_proj], lora_of),
        down=_group([mlp.down_proj], lora_of),
    )


def _group(modules: Sequence[Any], lora_of: Mapping[nn.Module, LoraWeights]) -> Group:
    """Stack the frozen weights of `modules`, which become views of the stack: no memory is spent twice."""
    plain = [getattr(module, "base_layer", module) for module in modules]
    weight = torch.cat([layer.weight.data for layer in plain])
    ends = [sum(layer.weight.shape[0] for layer in plain[: place + 1]) for place in range(len(plain))]
    outputs = [slice(end - layer.weight.shape[0], end) for end, layer in zip(ends, plain, strict=True)]
    for layer, rows in zip(plain, outputs, strict=True):
        layer.weight.data = weight[rows]
    bias = None if plain[0].bias is None else torch.cat([layer.bias.data for layer in plain])
    adapted = [(lora_of[module], rows) for module, rows in zip(modules, outputs, strict=True) if module in lora_of]
    members, columns = tuple(lora for lora, _ in adapted), tuple(rows for _, rows in adapted)
    return Group(weight, bias, LoraGroup(members, columns) if members else None)


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """y = x r w with r = 1 / sqrt(mean(x^2) + epsilon): dx = r (w dy) - x r^3 <w dy, x> / hidden, in float32."""
    wide, slope = x.float(), (dy * weight).float()
    r = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    dot = (slope * wide).sum(-1, keepdim=True)
    return slope.mul_(r).addcmul_(wide, r.pow(3).mul_(dot), value=-1 / x.shape[-1]).to(dy.dtype)
