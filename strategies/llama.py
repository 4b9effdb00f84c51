"""A hand-written forward and backward pass for decoders of Llama's shape, on CPUs.

The same numbers as transformers + peft (the tests hold it to that), with fewer and larger operations:

- q, k, v and gate, up share their input: one product each with the fused frozen weight, one with the stacked A;
- the frozen weights get no gradient, and nothing of autograd's bookkeeping is kept: per layer only what the backward
  pass reads;
- attention is explicit products per key/value head over the group's queries (no repeated keys), with the causal mask
  added in the product.

- sequences lie one after other without padding; only attention knows where one ends.

Shapes: x: (tokens, hidden); per run of sequences of one length q: (sequences * kv heads, group * length, head size);
k, v: (sequences * kv heads, length, head size); scores: (sequences * kv heads, group * length, length).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strategies.attention import real_places
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
    attended: list["Attended"]
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


class Attended(NamedTuple):
    """What attention's backward pass reads, for one run of sequences."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    """softmax of the scores"""


class Rotation(NamedTuple):
    """Rotary positions (Su et al., arXiv:2104.09864); (tokens, 1, head size / 2) each."""

    cosine: Tensor
    sine: Tensor


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


class Run(NamedTuple):
    """Sequences of one length that lie one after other."""

    rows: slice
    sequences: int
    length: int
    mask: Tensor
    """(1, group * length, length) causal; to the right of what is seen of a common beginning"""
    follows: bool = False
    """Whether the sequences continue what the first run is."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What is the same for all layers of one forward and backward pass."""

    runs: list["Run"]
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
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size, self.scaling, self.epsilon = attention.head_dim, attention.scaling, config.rms_norm_eps
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
        runs = _runs(lengths, self.heads // self.kv_heads, x.dtype, shared)
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
        half = self.head_size // 2
        return Rotation(cosine[0, :, None, :half].contiguous(), sine[0, :, None, :half].contiguous())

    def _layer_forward(self, block: Block, x: Tensor, now: Pass) -> tuple[Tensor, Kept]:
        qkv, z_qkv = block.qkv.forward(self._norm(x, block.norm_in), now.masks, now.enabled)
        mixed, attended = self._attend(qkv, now)
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
        dqkv = self._attend_backward(dmixed, kept.attended, now)
        dnormed = block.qkv.backward(dqkv, self._norm(kept.x, block.norm_in), z_qkv, now.masks)
        return _norm_backward(dnormed, kept.x, block.norm_in, self.epsilon).add_(dmiddle)

    def _attend(self, qkv: Tensor, now: Pass) -> tuple[Tensor, list[Attended]]:
        """qkv: (tokens, (heads + 2 kv heads) * head size)"""
        heads = qkv.view(len(qkv), -1, self.head_size)
        rotated = torch.empty_like(heads[:, : -self.kv_heads])
        _rotate(heads[:, : -self.kv_heads], now.rotation, rotated)
        mixed = qkv.new_empty(len(qkv), self.heads, self.head_size)
        kept: list[Attended] = []
        for run in now.runs:
            q = self._gather(rotated[run.rows, : self.heads], run)
            k = self._gather(rotated[run.rows, self.heads :], run)
            v = self._gather(heads[run.rows, -self.kv_heads :], run)
            if run.follows:  # the first run, alone, is what all of them begin with
                k, v = _behind(kept[0].k, k, run), _behind(kept[0].v, v, run)
            scores = torch.baddbmm(run.mask.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=self.scaling)
            weights = torch.softmax(scores, dim=-1)
            self._scatter(weights @ v, mixed[run.rows], run)
            kept.append(Attended(q, k, v, weights))
        return mixed.flatten(1), kept

    def _attend_backward(self, dmixed: Tensor, kept: list[Attended], now: Pass) -> Tensor:
        dheads = dmixed.new_empty(len(dmixed), self.heads + 2 * self.kv_heads, self.head_size)
        drotated = torch.empty_like(dheads[:, : -self.kv_heads])
        split = dmixed.view(len(dmixed), self.heads, self.head_size)
        for run, (q, k, v, weights) in zip(now.runs, kept, strict=True):
            do = self._gather(split[run.rows], run)
            dweights = do @ v.transpose(1, 2)
            dscores = torch._softmax_backward_data(dweights, weights, -1, do.dtype).mul_(self.scaling)
            self._scatter(dscores @ k, drotated[run.rows, : self.heads], run)
            before = k.shape[1] - run.length  # of a common beginning
            dk, dv = dscores.transpose(1, 2) @ q, weights.transpose(1, 2) @ do
            self._scatter(dk[:, before:], drotated[run.rows, self.heads :], run)
            self._scatter(dv[:, before:], dheads[run.rows, -self.kv_heads :], run)
            if before:
                drotated[:before, self.heads :] += self._of_all(dk[:, :before], run)
                dheads[:before, -self.kv_heads :] += self._of_all(dv[:, :before], run)
        _rotate(drotated, now.rotation, dheads[:, : -self.kv_heads], sign=-1)
        return dheads.flatten(1)

    def _gather(self, heads: Tensor, run: Run) -> Tensor:
        """(rows, any heads, head size) -> (sequences * kv heads, group * length, head size)"""
        split = heads.unflatten(0, (run.sequences, run.length)).unflatten(2, (self.kv_heads, -1))
        return split.permute(0, 2, 3, 1, 4).reshape(run.sequences * self.kv_heads, -1, self.head_size)

    def _of_all(self, values: Tensor, run: Run) -> Tensor:
        """(sequences * kv heads, length, head size) -> (length, kv heads, head size), summed over the sequences"""
        return values.unflatten(0, (run.sequences, self.kv_heads)).sum(0).transpose(0, 1)

    def _scatter(self, values: Tensor, heads: Tensor, run: Run) -> None:
        """The inverse of `_gather`, into `heads`."""
        split = values.view(run.sequences, self.kv_heads, -1, run.length, self.head_size).permute(0, 3, 1, 2, 4)
        heads.view(run.sequences, run.length, self.kv_heads, -1, self.head_size).copy_(split)


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


def _runs(lengths: Sequence[int], group: int, dtype: torch.dtype, shared: Prefix | None) -> list[Run]:
    """Neighbouring sequences of one length attend in one product."""
    runs: list[Run] = []
    start = before = 0
    if shared is not None:
        start = before = shared.length
        runs.append(Run(slice(0, start), 1, start, _causal_mask(start, group, dtype)))
    for length, same in itertools.groupby(lengths if shared is None else shared.rests):
        sequences = len(list(same))
        rows = slice(start, start + sequences * length)
        mask = torch.nn.functional.pad(_causal_mask(length, group, dtype), (before, 0))
        runs.append(Run(rows, sequences, length, mask, before > 0))
        start = rows.stop
    return runs


def _behind(first: Tensor, own: Tensor, run: Run) -> Tensor:
    """Keys or values of a common beginning (kv heads, length, head size) before those of each sequence."""
    return torch.cat([first.repeat(run.sequences, 1, 1), own], dim=1)


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


def _causal_mask(length: int, group: int, dtype: torch.dtype) -> Tensor:
    """(1, group * length, length): 0 where a query may look, -inf beyond; the group's queries one after other."""
    mask = torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)
    return mask.repeat(group, 1)[None]


def _rotate(heads: Tensor, rotation: Rotation, out: Tensor, sign: int = 1) -> None:
    """Rotate (tokens, heads, head size) by position into `out`; sign -1 is the inverse, which is the transpose."""
    first, second = heads.chunk(2, dim=-1)
    to_first, to_second = out.chunk(2, dim=-1)
    torch.mul(first, rotation.cosine, out=to_first)
    to_first.addcmul_(second, rotation.sine, value=-sign)
    torch.mul(second, rotation.cosine, out=to_second)
    to_second.addcmul_(first, rotation.sine, value=sign)


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """y = x r w with r = 1 / sqrt(mean(x^2) + epsilon): dx = r (w dy) - x r^3 <w dy, x> / hidden, in float32."""
    wide, slope = x.float(), (dy * weight).float()
    r = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    dot = (slope * wide).sum(-1, keepdim=True)
    return slope.mul_(r).addcmul_(wide, r.pow(3).mul_(dot), value=-1 / x.shape[-1]).to(dy.dtype)
