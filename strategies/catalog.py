"""The strategies by name, with their parameters and defaults. Torch-free: the daemon checks a config against it.

A strategy is one entry `[[models.NAME.strategy]]` of the config: `name = "ewc"` and any of its parameters. They compose
in the order given; `naive` (no protection) is the empty list.
"""

from typing import Annotated, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Replay(msgspec.Struct, frozen=True, tag_field="name", tag="replay", forbid_unknown_fields=True):
    """Rehearsal (Rolnick et al., arXiv:1811.11682): examples of the past are mixed into the training set."""

    ratio: Share = 0.5
    """Share of replayed examples among new and replayed ones: n = r / (1 - r) x new in each epoch, others each time."""
    general_ratio: Share = 0.2
    """Share of general text in all of an epoch: from `general_directory`, what that lacks written by the base model."""


class Ewc(msgspec.Struct, frozen=True, tag_field="name", tag="ewc", forbid_unknown_fields=True):
    """Elastic weight consolidation (Kirkpatrick et al., arXiv:1612.00796) on the adapter's parameters."""

    strength: NotNegative = 1.0
    """lambda of L + lambda/2 sum_i F_i (theta_i - theta*_i)^2, with F normalised to mean 1 per update."""
    mode: Literal["online", "separate"] = "online"
    """`online`: one decaying penalty around the latest weights; `separate`: one per update, summed exactly."""
    decay: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.95
    """gamma of the online form F <- gamma F + F_new (Schwarz et al., arXiv:1805.06370)."""
    samples: Count = 64
    """Examples whose per-example squared gradients estimate the Fisher information."""
    normalise: bool = True
    """Scale each update's Fisher information to mean 1, so that a memorised update is protected as well as any."""
    cap: Count = 8
    """`separate`: all past updates together weigh at most as much as so many of them."""
    general: NotNegative = 0.0
    """Weight of the pre-training task (Fisher information on general text, taken before the first update)."""


class Kronecker(msgspec.Struct, frozen=True, tag_field="name", tag="kronecker", forbid_unknown_fields=True):
    """EWC on dW = s B A instead of A and B; importances as inputs x outputs (as K-FAC's diagonal, arXiv:1503.05671)."""

    strength: NotNegative = 0.1
    """lambda of L + lambda/2 sum_ij c g_i a_j (dW - dW*)_ij^2 over all layers."""
    decay: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.95
    """Weight of the importances so far when an update's are added."""
    samples: Count = 64
    """Examples whose activations and gradients give the factors."""
    normalise: bool = True
    """Scale each update's importances to mean 1 over all weights."""
    general: NotNegative = 0.0
    """Weight of the pre-training task (importances on general text, taken before the first update)."""


class Gem(msgspec.Struct, frozen=True, tag_field="name", tag="gem", forbid_unknown_fields=True):
    """Gradient episodic memory (Lopez-Paz & Ranzato, arXiv:1706.08840): one constraint per past update."""

    constraints: Count = 4
    """At most so many past updates constrain the gradient (the most recent, and evenly spaced older ones)."""
    examples: Count = 16
    """Examples of each past update in its reference gradient, drawn anew whenever that is computed."""
    strength: NotNegative = 0.5
    """The paper's gamma: at least so much of every memory's gradient is in each step. 0: only harm is taken away."""
    refresh_steps: Count = 1
    """Reference gradients are computed anew every so many steps."""


class AGem(msgspec.Struct, frozen=True, tag_field="name", tag="agem", forbid_unknown_fields=True):
    """Averaged GEM (Chaudhry et al., arXiv:1812.00420): one constraint, the average gradient on the memory."""

    examples: Count = 16
    """Examples in the reference batch, drawn anew at each step."""
    strength: NotNegative = 1.0
    """At least so much of the reference gradient is in each step (GEM's gamma; the paper's A-GEM has 0)."""


class Distill(msgspec.Struct, frozen=True, tag_field="name", tag="distill", forbid_unknown_fields=True):
    """Learning without forgetting by KL(teacher || model) (Li & Hoiem, arXiv:1606.09282; Hinton's temperature)."""

    strength: NotNegative = 3.0
    """Weight of the term, per label token of the batch."""
    teacher: Literal["base", "previous"] = "base"
    """`base`: the model without adapter; `previous`: the version that the run continues."""
    on: Literal["general", "replay", "both", "all"] = "general"
    """On which examples the model is held to its teacher; `all`: on the new ones as well, as the paper does."""
    anchor_only: bool = True
    """General examples are held and not learned: no loss of their own, only the divergence's mean over their tokens."""
    temperature: Positive = 1.0
    """T of both sides; above 1 the less likely answers count more."""
    top: Count = 20
    """The teacher's K most likely tokens, the rest as one bucket."""


class DerPlusPlus(msgspec.Struct, frozen=True, tag_field="name", tag="derpp", forbid_unknown_fields=True):
    """Dark experience replay (Buzzega et al., arXiv:2004.07211): replayed examples keep what was said when learned."""

    strength: NotNegative = 0.5
    """alpha: weight of KL(stored || model) on replayed examples; `replay` brings beta, their loss in the mix."""
    top: Count = 20
    """Stored tokens per position, the rest as one bucket."""
    cap: Count = 2000
    """At most so many examples keep their stored answers: as many as the replay buffer holds."""


class SynapticIntelligence(msgspec.Struct, frozen=True, tag_field="name", tag="si", forbid_unknown_fields=True):
    """Importances from the path of training (Zenke et al., arXiv:1703.04200): no pass over the data afterwards."""

    strength: NotNegative = 1.0
    """lambda of L + lambda/2 sum_i Omega_i (theta_i - theta*_i)^2, with Omega scaled to mean 1 per update."""
    decay: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    """Weight of the importances so far when an update's are added."""
    damping: Positive = 0.1
    """xi, in units of the update's mean squared move."""


class MemoryAwareSynapses(msgspec.Struct, frozen=True, tag_field="name", tag="mas", forbid_unknown_fields=True):
    """Importances from the sensitivity of the output (Aljundi et al., arXiv:1711.09601): no labels needed."""

    strength: NotNegative = 0.1
    """lambda of L + lambda/2 sum_i Omega_i (theta_i - theta*_i)^2, with Omega scaled to mean 1 per update."""
    decay: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.95
    """Weight of the importances so far when an update's are added."""
    samples: Count = 64
    """Examples whose outputs are differentiated."""


class SlowAverage(msgspec.Struct, frozen=True, tag_field="name", tag="ema", forbid_unknown_fields=True):
    """A slow moving average of all versions (CLS-ER's stable model, Arani et al., arXiv:2201.12604) to fall back on."""

    decay: Share = 0.9
    """d of average <- d average + (1 - d) weights; the plain mean as long as there are few versions."""


class Augment(msgspec.Struct, frozen=True, tag_field="name", tag="augment", forbid_unknown_fields=True):
    """Noise on the embeddings while training (NEFTune, Jain et al., arXiv:2310.05914), against memorised wording."""

    noise: NotNegative = 5.0
    """alpha of U(-1, 1) alpha / sqrt(tokens x width); the paper tries 5, 10 and 15."""


class Rewrite(msgspec.Struct, frozen=True, tag_field="name", tag="rewrite", forbid_unknown_fields=True):
    """The new examples in other words as well (Allen-Zhu & Li, arXiv:2309.14316): facts found again however asked."""

    rows: Count = 2
    """At most so many derived rows of one new example."""
    templates: bool = True
    """Questions in other frames (`Please tell me: ...`)."""
    sentences: bool = True
    """Of texts: each sentence alone."""
    chunks: bool = False
    """Of texts: overlapping halves."""
    paraphrases: bool = False
    """Questions and texts in a teacher's words; answers are never reworded."""
    questions: bool = False
    """Of texts: a teacher's questions, with answers that stand in the text word for word."""
    teacher_url: str = ""
    """An OpenAI-compatible server, `http://127.0.0.1:8000/v1`; empty: the version that the run continues."""
    teacher_model: str = ""
    """The model's name there."""
    teacher_token_variable: str = ""
    """Environment variable of the daemon that holds the bearer token; empty: none."""


SCHEDULERS = ("ConstantLR", "CosineAnnealingLR", "ExponentialLR", "LinearLR", "PolynomialLR", "StepLR")
LOGGERS = ("TextLogger", "CSVLogger", "TensorboardLogger")
OWN_INSTEAD = {
    "AGEMPlugin": 'name = "agem"', "EWCPlugin": 'name = "ewc"', "GEMPlugin": 'name = "gem"',
    "LwFPlugin": 'name = "distill"', "MASPlugin": 'name = "mas"', "ReplayPlugin": 'name = "replay"',
    "SynapticIntelligencePlugin": 'name = "si"',
    "GDumbPlugin": 'name = "replay" with the buffer policy "balanced"',
}  # fmt: skip
"""Avalanche's plugins that copy the whole model or assume a classifier, and what does the same here."""


MIR_SUBSAMPLE = 32
"""`MIRPlugin`: candidates of a step unless `subsample` says otherwise; Avalanche's 200 cost more than the step."""
STREAMS = ("heldout_new", "eval")
"""`EarlyStoppingPlugin`: what `val_stream_name` may be; the first unless it is given."""
PARAMETERS: dict[str, set[str] | None] = {
    "LRSchedulerPlugin": None,
    "EarlyStoppingPlugin": {"patience", "margin", "val_stream_name"},
    "MIRPlugin": {"subsample"},
    **{logger: {"directory"} for logger in LOGGERS},
}
"""The plugins that fit and what they take; None: what torch's scheduler takes is for torch to say."""


class Avalanche(msgspec.Struct, frozen=True, tag_field="name", tag="avalanche", forbid_unknown_fields=True):
    """A plugin of Avalanche (Lomonaco et al., arXiv:2104.00405), of those that fit or were made to."""

    plugin: str = "LRSchedulerPlugin"
    """`LRSchedulerPlugin`, `EarlyStoppingPlugin`, `MIRPlugin`, `TextLogger`, `CSVLogger` or `TensorboardLogger`; one
    entry for each that is wanted."""
    parameters: dict[str, float | int | str | bool] = {}
    """The plugin's own: `scheduler = "StepLR"` and torch's arguments, `step_granularity`; a logger's `directory`;
    `patience`, `margin` and `val_stream_name` (`heldout_new` or `eval`); MIR's `subsample`."""

    def __post_init__(self) -> None:
        if self.plugin in OWN_INSTEAD:
            raise ValueError(f"{self.plugin} does not fit a language model's adapter; use {OWN_INSTEAD[self.plugin]}")
        if self.plugin not in PARAMETERS:
            raise ValueError(f"no plugin {self.plugin!r}; known: {', '.join(PARAMETERS)}")
        takes = PARAMETERS[self.plugin]
        if self.plugin in LOGGERS and set(self.parameters) != takes:
            raise ValueError(f"{self.plugin} takes the parameter `directory`, where it writes, and no other")
        if takes is not None and set(self.parameters) - takes:
            raise ValueError(f"{self.plugin} takes {', '.join(sorted(takes))}; the buffer and `replay` have the rest")
        if self.parameters.get("val_stream_name", STREAMS[0]) not in STREAMS:
            raise ValueError(f"no hold-out {self.parameters['val_stream_name']!r}; known: {', '.join(STREAMS)}")
        if self.plugin == "LRSchedulerPlugin" and self.parameters.get("scheduler", "ExponentialLR") not in SCHEDULERS:
            raise ValueError(f"no scheduler {self.parameters['scheduler']!r}; known: {', '.join(SCHEDULERS)}")


class Freeze(msgspec.Struct, frozen=True, tag_field="name", tag="freeze", forbid_unknown_fields=True):
    """The bottom layers' adapter stays as it is; the backward pass ends above it, which saves time."""

    share: Share = 0.5
    """Share of the decoder layers, from the bottom, that an update leaves alone."""


class OLora(msgspec.Struct, frozen=True, tag_field="name", tag="olora", forbid_unknown_fields=True):
    """Orthogonal subspaces (Wang et al., arXiv:2310.14152): each update trains its own slice of the adapter's rank."""

    strength: NotNegative = 0.5
    """lambda of sum |A_past A^T|."""
    slice_rank: Count = 4
    """Rank of one update; must divide the adapter's. After rank / slice_rank updates the oldest slice is used again."""


Strategy = (
    Replay
    | Ewc
    | Kronecker
    | Gem
    | AGem
    | Distill
    | DerPlusPlus
    | SynapticIntelligence
    | MemoryAwareSynapses
    | SlowAverage
    | Augment
    | Rewrite
    | Avalanche
    | Freeze
    | OLora
)
BY_NAME: dict[str, type[Strategy]] = {
    "replay": Replay,
    "ewc": Ewc,
    "kronecker": Kronecker,
    "gem": Gem,
    "agem": AGem,
    "distill": Distill,
    "derpp": DerPlusPlus,
    "si": SynapticIntelligence,
    "mas": MemoryAwareSynapses,
    "ema": SlowAverage,
    "augment": Augment,
    "rewrite": Rewrite,
    "avalanche": Avalanche,
    "freeze": Freeze,
    "olora": OLora,
}


def key_of(strategy: Strategy) -> tuple[str, str]:
    """What may be given once: a strategy, or one plugin of Avalanche."""
    return type(strategy).__name__, strategy.plugin if isinstance(strategy, Avalanche) else ""
