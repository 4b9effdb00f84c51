"""`eternad plan`: what an update will take, computed from the base's configuration before anything is started.

Pure arithmetic over shapes: nothing is loaded. d: hidden size, L: layers, q: heads x head size, k: key/value heads x
head size, m: inner size, V: vocabulary, r: rank, s: tokens of a sequence, n: parameters of the adapter.
What is computed here is checked against measured small models in tests/test_plan.py; `docs/scale.md` has an 8B example.
"""

import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from daemon.config import Model
from strategies.catalog import AGem, Distill, Ewc, Gem, Kronecker, MemoryAwareSynapses, Replay, SynapticIntelligence

GIB = 1024**3
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHUNK_ROWS = 256
"""Label rows whose logits exist at a time (`strategies.token_loss`)."""
LIBRARIES_BYTES = 480 * 1024**2
"""Resident memory of a CPU trainer that holds a model of 27 k parameters: Python, torch, transformers, peft."""
CUDA_BYTES = int(0.8 * GIB)
"""Context, cuBLAS workspaces and fragmentation of one GPU: an assumption, not measured here."""
FLOPS_CPU_THREAD, FLOPS_GPU = 0.15e12, 400e12
"""Sustained rates that are assumed where none is given: bf16 GEMM of one server core, half of an H100's."""
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Per weight: 4 bits, a scale of 8 for 64 weights, one of 32 for 256 scales (Dettmers et al., arXiv:2305.14314)."""
MASTER_COPIES = 6
"""float32 vectors of n: weights, gradient, Adam's two, the start of the run, the best so far."""


Proposal = Literal["process", "torchrun", "none"]


class CannotPlan(Exception):
    """The base's configuration does not say what is needed; the message names the file and the key."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder of Llama's kind, as its `config.json` describes it."""

    hidden: int
    layers: int
    queries: int
    """heads x head size"""
    keys: int
    """key/value heads x head size"""
    heads: int
    inner: int
    vocabulary: int
    tied: bool
    """The output layer is the embedding."""

    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer."""
        d, m = self.hidden, self.inner
        sizes = ((d, self.queries), (d, self.keys), (d, self.keys), (self.queries, d), (d, m), (d, m), (m, d))
        return dict(zip(LINEARS, sizes, strict=True))

    @property
    def linear_parameters(self) -> int:
        """In the decoder's linear layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears().values())

    @property
    def parameters(self) -> int:
        """Of the base, with embeddings and norms."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.linear_parameters + embeddings + (2 * self.layers + 1) * self.hidden

    def adapter_parameters(self, rank: int, targets: list[str]) -> int:
        """n = L r sum of (inputs + outputs) over the targeted layers (Hu et al., arXiv:2106.09685)."""
        chosen = [size for name, size in self.linears().items() if targets == ["all-linear"] or name in targets]
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in chosen)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What an update asks of the machine besides the model's shape."""

    rank: int
    targets: list[str]
    bytes_per_weight: Literal[2, 4]
    quantize: Literal["none", "nf4"] = "none"
    """How the decoder's linear layers are kept; they are multiplied in `bytes_per_weight`."""
    micro_batch_tokens: int
    sequence_tokens: int
    recompute_layers: bool = False
    is_cuda: bool = False
    state_vectors: float = 0.0
    """float32 vectors of n that the strategies keep."""
    passes: float = 1.0
    """Work of a step in units of one forward and backward pass over the batch."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes at the peak of training, by what holds them."""

    base: int
    adapter: int
    strategies: int
    activations: int
    logits: int
    runtime: int

    @property
    def total(self) -> int:
        """All of it on one device."""
        return sum(msgspec.structs.astuple(self))


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer; bytes, FLOPs and seconds are computed, not measured."""

    model: str
    shape: Shape
    load: Load
    parameters: int
    adapter_parameters: int
    memory: Memory
    memory_total: int
    flops_per_token: int
    flops_per_second: float
    tokens: int
    """Trained tokens of a full update at the most: every epoch, every sequence at its full length."""
    seconds: float
    executor: Proposal
    """`none`: no executor can hold it on these GPUs."""
    advice: str


def read_shape(base: Path) -> Shape:
    """The shape in `BASE/config.json`; raises `CannotPlan`."""
    path = base / "config.json"
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise CannotPlan(f"{path} cannot be read: {error}") from None
    found = found.get("text_config", found)
    if found.get("num_experts") or found.get("num_local_experts"):
        raise CannotPlan(f"{path}: a mixture of experts; only dense decoders can be planned")
    try:
        heads = found["num_attention_heads"]
        size = found.get("head_dim") or found["hidden_size"] // heads
        return Shape(
            hidden=found["hidden_size"], layers=found["num_hidden_layers"], heads=heads, queries=heads * size,
            keys=found.get("num_key_value_heads", heads) * size, inner=found["intermediate_size"],
            vocabulary=found["vocab_size"], tied=found.get("tie_word_embeddings", False),
        )  # fmt: skip
    except KeyError as missing:
        raise CannotPlan(f"{path} has no key {missing}: not a decoder of Llama's kind") from None


def load_of(model: Model, sequence_tokens: int | None, *, is_cuda: bool) -> Load:
    """What a model's configuration asks for; `precision = "auto"` is taken as bfloat16."""
    training = model.training
    sequence = min(sequence_tokens or training.sequence_tokens, training.sequence_tokens)
    return Load(
        rank=model.lora.rank, targets=model.lora.targets, is_cuda=is_cuda, sequence_tokens=sequence,
        bytes_per_weight=4 if training.precision == "float32" else 2, quantize=training.quantize,
        micro_batch_tokens=max(min(training.micro_batch_tokens, training.batch_examples * sequence), sequence),
        recompute_layers=training.recompute_layers, state_vectors=_state_vectors(model), passes=_passes(model),
    )  # fmt: skip


def _state_vectors(model: Model) -> float:
    """float32 vectors of n: importances and anchor; one gradient per constraint; the path of SI beside its anchor."""
    vectors = 0.0
    for strategy in model.strategy:
        match strategy:
            case Ewc() | MemoryAwareSynapses() | Kronecker():
                vectors += 2
            case SynapticIntelligence():
                vectors += 5
            case Gem(constraints=constraints):
                vectors += constraints + 1
            case AGem():
                vectors += 2
            case Distill(teacher="previous"):
                vectors += 1
    return vectors


def _passes(model: Model) -> float:
    """A reference gradient is a pass of its own; a teacher only the forward half."""
    passes = 1.0
    for strategy in model.strategy:
        match strategy:
            case Gem():
                examples = strategy.constraints * strategy.examples / model.training.batch_examples
                passes += examples / strategy.refresh_steps
            case AGem(examples=examples):
                passes += examples / model.training.batch_examples
            case Distill():
                passes += 0.5
    return passes


def flops_per_token(shape: Shape, load: Load) -> int:
    """4 x linear + 4 x head + 6 x adapter + attention: two products per weight that is frozen, three per trained one.

    A product of one token with one weight is 2 FLOPs; frozen weights need the forward product and the one for the
    inputs' gradient, but none for their own (Kaplan et al., arXiv:2001.08361, count 6 for a weight that is trained).
    Attention: 12 q s per layer, all of the square; half of it where a GPU's kernel skips the masked half.
    Recomputed layers: their forward products, a third of the adapter's and of attention's, once more.
    """
    adapter = shape.adapter_parameters(load.rank, load.targets)
    attention = 12 * shape.layers * shape.queries * load.sequence_tokens // (2 if load.is_cuda else 1)
    again = 2 * shape.linear_parameters + 2 * adapter + attention // 3 if load.recompute_layers else 0
    return 4 * (shape.linear_parameters + shape.vocabulary * shape.hidden) + 6 * adapter + attention + again


def memory_of(shape: Shape, load: Load) -> Memory:
    """At the peak of a training step; where layers are recomputed, their inputs and all of a single one.

    Per token and layer the backward pass reads x, middle (d), q and mixed (q), k, v (k), gate and up (2 m), silu (m),
    the ranks of 7 adapters, and on a CPU the softmax (heads x s); see `strategies.llama.Kept`. One layer's gradients
    come on top. The adapter: `MASTER_COPIES` float32 vectors and a working copy in the compute precision.
    """
    width, tokens = load.bytes_per_weight, load.micro_batch_tokens
    n = shape.adapter_parameters(load.rank, load.targets)
    kept = 2 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 3 * shape.inner + 7 * load.rank
    kept += 0 if load.is_cuda else shape.heads * load.sequence_tokens
    layers = shape.hidden * shape.layers + kept if load.recompute_layers else shape.layers * kept
    passing = 4 * shape.inner + 4 * shape.hidden + (0 if load.is_cuda else 2 * shape.heads * load.sequence_tokens)
    return Memory(
        base=_base_bytes(shape, load),
        adapter=n * (4 * MASTER_COPIES + width),
        strategies=round(n * 4 * load.state_vectors),
        activations=tokens * width * (layers + passing),
        logits=min(CHUNK_ROWS, tokens) * shape.vocabulary * (2 * width + 4),
        runtime=CUDA_BYTES if load.is_cuda else LIBRARIES_BYTES,
    )


def _base_bytes(shape: Shape, load: Load) -> int:
    """In 4 bits: the linear layers, and one of them at a time in the precision in which it is multiplied."""
    whole = shape.parameters * load.bytes_per_weight
    if load.quantize == "none":
        return whole
    largest = max(inputs * outputs for inputs, outputs in shape.linears().values())
    saved = shape.linear_parameters * (load.bytes_per_weight - NF4_BYTES)
    return whole - round(saved) + largest * load.bytes_per_weight


def sharded(memory: Memory, gpus: int, whole: int) -> int:
    """Bytes on each of `gpus` under `fsdp2`: the decoder's layers are divided (arXiv:2304.11277), all else is not.

    whole: bytes of the base that every GPU keeps, embedding and output layer. The layer that is gathered at the time
    is left out.
    """
    return (memory.base - whole) // gpus + whole + memory.total - memory.base


def plan(
    name: str, model: Model, *, gpus: int = 0, gpu_memory_gib: float | None = None, sequence: int | None = None,
    flops: float | None = None,
) -> Plan:  # fmt: skip
    """Memory and time of a full update of `model`; without `gpus` on the CPU. Raises `CannotPlan`."""
    shape, load = read_shape(model.base_path), load_of(model, sequence, is_cuda=gpus > 0)
    memory, per_token = memory_of(shape, load), flops_per_token(shape, load)
    rate = flops or (FLOPS_GPU if gpus else FLOPS_CPU_THREAD * model.threads)
    tokens = tokens_of(model, load.sequence_tokens)
    whole = (shape.parameters - shape.linear_parameters) * load.bytes_per_weight
    if load.quantize != "none":
        whole = memory.base  # 4-bit weights cannot be divided
    executor, advice = propose(memory, gpus, gpu_memory_gib, whole)
    if executor == "none" and load.quantize == "none" and gpu_memory_gib is not None:
        small = memory_of(shape, msgspec.structs.replace(load, quantize="nf4")).total
        if small <= gpu_memory_gib * GIB:
            advice += f"; with quantize = 'nf4' {small / GIB:.1f} GiB on each GPU are enough"
    return Plan(
        model=name, shape=shape, load=load, parameters=shape.parameters, memory=memory, memory_total=memory.total,
        adapter_parameters=shape.adapter_parameters(load.rank, load.targets), flops_per_token=per_token,
        flops_per_second=rate, tokens=tokens, seconds=tokens * per_token * load.passes / rate, executor=executor,
        advice=advice,
    )  # fmt: skip


def tokens_of(model: Model, sequence_tokens: int) -> int:
    """Of an update that begins at the schedule's threshold: new and replayed examples, every epoch."""
    replay = next((each for each in model.strategy if isinstance(each, Replay)), Replay(0.0, 0.0))
    own = model.schedule.threshold_examples / max(1 - replay.ratio, 0.01)
    examples = own / max(1 - replay.general_ratio, 0.01)  # which is a share of all of them
    return round(examples * sequence_tokens * model.training.epochs)


def propose(memory: Memory, gpus: int, gpu_memory_gib: float | None, whole: int) -> tuple[Proposal, str]:
    """The executor that fits, with its keys in [models.NAME.parallel], or what would be needed; one sentence."""
    if not gpus:
        return "process", f"one process on the CPU, {memory.total / GIB:.1f} GiB of free memory"
    if gpu_memory_gib is None or memory.total <= gpu_memory_gib * GIB:
        if gpus == 1:
            return "process", f"one process on one GPU, {memory.total / GIB:.1f} GiB of its memory"
        return "torchrun", f"backend = 'ddp', processes = {gpus}: {memory.total / GIB:.1f} GiB on each GPU"
    each = sharded(memory, gpus, whole)
    if gpus > 1 and each <= gpu_memory_gib * GIB:
        return "torchrun", f"backend = 'fsdp2', processes = {gpus}: {each / GIB:.1f} GiB on each GPU"
    least = memory.total - memory.base + whole
    needed = f"{least / GIB:.1f} GiB of it cannot be sharded: lower micro_batch_tokens first, then recompute_layers"
    if least < gpu_memory_gib * GIB:
        enough = math.ceil((memory.base - whole) / (gpu_memory_gib * GIB - least))
        needed = f"sharded (`fsdp2`) it needs {max(enough, 2)} such GPUs"
    return "none", f"does not fit {gpus} GPU{'s' * (gpus > 1)} of {gpu_memory_gib:g} GiB; {needed}"
