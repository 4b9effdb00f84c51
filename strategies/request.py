"""The JSON contract between the daemon and a training child. Torch-free.

The daemon writes `RUN_DIR/experience.jsonl` (rows of `buffers.experience.Row`) and `RUN_DIR/request.json`, then starts
`python -m strategies.train RUN_DIR`. The child replaces `progress.json` as it goes, writes `adapter/` and `strategy/`
and, last of all, `report.json`: readers trust only the report. Exit codes: 0 = report written, status `trained`;
1 = report written, status `failed`; 75 = told to stop, checkpoint written, start again with the same RUN_DIR to resume.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from strategies.catalog import Count, NotNegative, Positive, Share, Strategy
from strategies.parallel.choice import Parallel

EXIT_TRAINED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 75


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The adapter (Hu et al., arXiv:2106.09685)."""

    rank: Count = 16
    alpha: Positive = 32.0
    """Scaling alpha / rank; 2 x rank is the common choice."""
    dropout: Share = 0.05
    targets: list[str] = msgspec.field(default_factory=lambda: ["all-linear"])
    """Module names, or `all-linear` for every linear layer but the head."""


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One update's optimisation."""

    learning_rate: Positive = 2e-4
    epochs: Count = 3
    batch_examples: Count = 8
    """Examples per optimiser step."""
    micro_batch_tokens: Count = 2048
    """Tokens per forward pass: bounds memory, not the result."""
    recompute_layers: bool = False
    """Keep only the inputs of the layers for the backward pass: half as much work again, a fraction of the memory, the
    same result. A run that has no memory left even with shorter passes does so by itself."""
    sequence_tokens: Count = 1024
    """Longer examples are cut at the end."""
    weight_decay: NotNegative = 0.01
    warmup_share: Share = 0.05
    """Share of the steps in which the learning rate rises; afterwards it decays to 0 (cosine)."""
    clip_norm: Positive = 1.0
    early_stop_patience: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Stop after so many epochs without a lower loss on the new hold-out (0: never)."""
    early_stop_new_loss: NotNegative = 0.0
    """An epoch counts as one with a lower loss while that is above the lowest by less than this (nats per token), and
    the latest such weights are kept. Facts that are said once, in one wording, need about 2: held out are others."""
    early_stop_old_loss: Positive = 0.2
    """Also stop when, past half of the steps, the loss on the old hold-outs has risen by so much (nats per token)."""
    merge_search: bool = False
    """Mix what was trained with the weights before it: 1, 3/4, 1/2 or 1/4 new, the most that forgets little enough."""
    merge_old_loss: NotNegative = 0.05
    """`merge_search`: the loss on the old hold-outs may rise by so much; where it always does, it is to rise least."""
    rebase_every_updates: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Every so many updates a fresh adapter learns the whole replay buffer beside what is new (0: never)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: the base's linear layers in 4 bits (QLoRA): about a quarter of the memory, at the price of a base that
    is off by their rounding; needs `eternad[qlora]`."""
    preference_beta: Positive = 0.1
    """beta of DPO and KTO for comparisons and ratings: the larger, the nearer the model stays to the version before."""
    keep_optimizer: bool = False


class RunRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a training child needs to know besides the rows of the experience."""

    format: Literal["eternad.run/1"] = "eternad.run/1"
    run_id: str
    model: str
    update_number: int
    base_path: Path
    parent_version: Path | None = None
    """Directory of the version to continue from (its adapter and its `strategy/`); None: a fresh adapter."""
    rebase: bool = False
    """Train a fresh adapter on an experience that has the whole buffer; the parent is only compared with."""
    experience_sha256: str
    lora: Lora
    training: Training
    parallel: Parallel = Parallel()
    strategies: list[Strategy] = []
    general_cache: Path | None = None
    """Where general text that the base model generated is kept, by base hash."""
    canary_prompts: list[str] = []
    """Prompts whose greedy continuation and log-probabilities prove later that an engine serves this adapter."""
    report_losses: bool = False
    """Also report the loss of every trained example afterwards: the buffer policy `surprise` goes by it."""
    seed: int = 0
    threads: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer loads before it has a run (`strategies.warm`)."""

    base_path: Path
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantize: Literal["none", "nf4"] = "none"
    threads: Count = 1

    def text(self) -> str:
        """As an argument of a command line."""
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def read(cls, text: str) -> "Wanted":
        """The inverse of `text`."""
        return msgspec.json.decode(text, type=cls, dec_hook=_path)


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """A mean with its 95 % bootstrap interval over examples."""

    mean: float
    low: float
    high: float
    examples: int


class Shift(msgspec.Struct, frozen=True, kw_only=True):
    """One hold-out before and after: nats per token of the completions."""

    base: Measure
    """The base model without any adapter."""
    before: Measure
    """The version that the run started from."""
    after: Measure
    """The candidate."""
    change: Measure
    """after - before, paired over examples."""


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """The candidate's own answer to a canary prompt: what a probe of an engine must find again."""

    prompt: str
    prompt_token_ids: list[int] = []
    """`prompt` as the trainer fed it to the model: rendered with the chat template up to the assistant's turn, and
    tokenised. An engine is probed with exactly these ids + `token_ids`, so no template and no tokenizer can differ."""
    token_ids: list[int]
    """The candidate's greedy continuation."""
    logprobs: list[float]
    """Log-probability of each of those tokens under the candidate."""
    base_logprobs: list[float]
    """Log-probability of the same tokens under the base: a probe that finds these has found no adapter."""
    text: str = ""
    """The continuation as text, for people: the status page compares it with the answer of the version before."""


class SequenceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What the updates so far have done to each other; scores are -loss, nats per token, so higher is better."""

    acc: Measure | None
    """ACC: over all hold-outs, the new one and those of past updates."""
    bwt: Measure | None = None
    """BWT: change on the old hold-outs since each was learned; below 0 means forgetting."""
    fwt: Measure | None = None
    """FWT: what the version before already knew of the new hold-out, beyond the base."""
    forgetting: Measure | None = None
    """Loss from the best score that each old example ever had."""
    matrix: dict[str, dict[str, float]] = {}
    """R[i][j]: mean score on the hold-out of update j after update i."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate judges."""

    new: Shift | None
    """The new hold-out; None when there is none."""
    old: dict[str, Shift] = {}
    """One per past update (key: its number), on hold-outs that were never trained on."""
    eval: Shift | None = None
    """The examples of `eval/`."""
    general: Shift | None = None
    """Loss on general text that is neither trained nor an anchor."""
    sequence: SequenceMetrics | None = None
    """R, ACC, BWT, FWT and forgetting over the updates so far."""
    drift_base: Measure | None = None
    """KL(base || candidate), nats per token, on general text and prompts."""
    drift_previous: Measure | None = None
    """KL(previous version || candidate) on the same."""
    preference: dict[str, float] = {}
    """Share of held-out comparisons ranked right: `base`, `before`, `after`."""
    preference_losses: dict[str, Shift] = {}
    """Loss on the held-out comparisons (DPO) and ratings (KTO), the base being the reference: of `new`, `eval` and past
    updates by their number. Not nats per token: the base has log 2 and 1/2."""
    noise: float = 0.0
    """Largest difference between two evaluations of the same weights: smaller changes mean nothing."""


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a training child says when it is done; its existence means that everything else is on disk."""

    format: Literal["eternad.report/1"] = "eternad.report/1"
    run_id: str
    status: Literal["trained", "failed"]
    reason: str = ""
    """For `failed`: what happened, where, what to do."""
    code: str = ""
    """For `failed`: machine-readable (`oom`, `non_finite_loss`, `nothing_to_learn`, `base_missing`, ...)."""
    examples: dict[str, int] = {}
    """Rows by role, and `shortfall` of the replay."""
    replay_ratio: float = 0.0
    """Share of replayed examples that was reached."""
    steps: int = 0
    epochs: float = 0.0
    stopped_early: str = ""
    tokens: int = 0
    """Real tokens (no padding) trained on."""
    seconds: dict[str, float] = {}
    """Wall time by phase: load, train, fisher, evaluate, save, total."""
    tokens_per_second: float = 0.0
    losses: list[tuple[int, float]] = []
    """(step, mean loss of its completion tokens)."""
    example_losses: list[tuple[int, float]] = []
    """(row of the journal, nats per completion token) under the candidate, for `report_losses`."""
    example_tokens: list[tuple[int, int]] = []
    """(row of the journal, tokens) of every new example: what bounds a buffer by `tokens`."""
    evaluation: Evaluation | None = None
    canaries: list[Canary] = []
    strategies: dict[str, dict[str, float]] = {}
    """What each strategy counted: EWC's first and last penalty, GEM's projections, ..."""
    peak_memory_bytes: int = 0
    """Of the process that writes the report."""
    backend: str = "single"
    processes: int = 1
    libraries: dict[str, str] = {}
    derived_sha256: str = ""
    """Of `derived.jsonl`, the run's new examples in other words; empty where `rewrite` is not used."""
    base_sha256: str = ""
    """Of the base's weights, configuration and tokenizer."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """`progress.json`, replaced atomically at every step: the daemon's heartbeat of a run."""

    phase: Literal["load", "baseline", "train", "fisher", "evaluate", "save"]
    step: int = 0
    steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    at: float
    """Seconds since the epoch."""


def write(path: Path, value: Any) -> None:
    """Write `value` as JSON so that a reader sees all of it or the old file: temporary name, fsync, rename, fsync."""
    import os  # the only user of it here

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(value, enc_hook=str))  # paths
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_request(run_directory: Path) -> RunRequest:
    """`request.json`, strictly; raises `msgspec.ValidationError` naming the field."""
    return msgspec.json.decode((run_directory / "request.json").read_bytes(), type=RunRequest, dec_hook=_path)


def _path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise TypeError(f"no {kind} in a request")


def read_report(run_directory: Path) -> RunReport | None:
    """`report.json`, or None while the run is not done."""
    try:
        return msgspec.json.decode((run_directory / "report.json").read_bytes(), type=RunReport)
    except FileNotFoundError:
        return None


def read_progress(run_directory: Path) -> Progress | None:
    """`progress.json`, or None before the first step."""
    try:
        return msgspec.json.decode((run_directory / "progress.json").read_bytes(), type=Progress)
    except FileNotFoundError:
        return None
