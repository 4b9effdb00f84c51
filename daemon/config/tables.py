"""What stands in the configuration: its tables and keys.

The text under a field is its documentation: `eternad init` and `docs/configure.md` are made of it.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from buffers.policy import Buffer
from daemon.notify.settings import Notify
from daemon.rollout import Rollout
from daemon.trust.metric import Metric
from daemon.trust.policy import Trust
from daemon.tuning.rules import Tuning
from strategies.catalog import Count, NotNegative, Positive, Strategy
from strategies.parallel.choice import Parallel
from strategies.request import Lora, Training

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Watch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The drop directory."""

    stability_seconds: NotNegative = 5.0
    """A file is finished when nothing about it has changed for so long."""
    scan_seconds: Positive = 60.0
    """Every so often the whole directory is compared with what is known; events only make it faster."""
    never_stable_seconds: Positive = 3600.0
    """A file that keeps changing for so long is quarantined."""
    file_bytes_max: Count = 64 * 1024 * 1024
    """Larger content files are quarantined unread. Feedback files may have any size: they are read line by line."""
    line_bytes_max: Count = 1024 * 1024
    """Longer lines of a jsonl file are quarantined one by one."""
    chunk_characters: Count = 1200
    """Prose is cut into examples of about so many characters, at paragraph boundaries."""
    heldout_fraction: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.1
    """Share of the examples that is never trained on, decided once at ingest: the gate tests on them."""


class Engine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What serves models: an inference engine that is reached over HTTP."""

    kind: Literal["embedded", "vllm", "vllm_shaped", "sglang", "lorax", "mistral", "llama_server", "directory"] = (
        "embedded"
    )
    urls: list[str] = msgspec.field(default_factory=list)
    """One per replica: `http://127.0.0.1:8900`, or `unix:/run/eternad/engine.sock`."""
    token_file: Path | None = None
    """File with the bearer token of the engine; `credential:NAME`: systemd's credential of the unit that reads it."""
    slots: Count = 3
    """Adapters that it keeps ready at once, three for each model that it serves: the live version, the one before it
    and the candidate. `embedded` and `mistral` say it themselves."""
    timeout_seconds: Positive = 30.0
    reconcile_seconds: Positive = 5.0
    """Every so often the desired version is compared with what the engine really serves."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When an update is due: `(threshold and quiet) or max_age`, or the cron or interval fires and something waits."""

    threshold_examples: Count = 32
    quiet_seconds: NotNegative = 30.0
    """No new example for so long: a writer's batch is complete."""
    max_age_seconds: Positive = 86400.0
    """An example never waits longer than this."""
    cron: str | None = None
    """Five fields, local time: `0 4 * * *`."""
    interval_seconds: Positive | None = None
    examples_max: Count = 2000
    """One update learns at most so many new examples; the rest waits for the next."""
    windows: list[str] = msgspec.field(default_factory=list)
    """Updates begin only then, local time: `22:00-06:00`, `mon-fri 20:00-24:00`; none: at any time."""
    blackouts: list[str] = msgspec.field(default_factory=list)
    """Days on which none begins: `2026-12-24`, `2026-12-24..2027-01-02`."""
    load_max: Positive | None = None
    """None begins while the machine's load (average of a minute, per CPU) is above this: `0.5`."""


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a candidate must prove. Losses are nats per token of the completions."""

    new_gain_min: float = 0.02
    """The loss on the new hold-out must fall by at least so much against the version it started from."""
    old_loss_max: NotNegative = 0.15
    """The loss on the old hold-outs may rise by at most so much."""
    eval_loss_max: NotNegative = 0.15
    """The loss on the examples of `eval/` may rise by at most so much."""
    drift_base_max: Positive = 1.0
    """KL(base || candidate) may be at most so much."""
    drift_previous_max: Positive = 1.0
    """KL(served version || candidate) may be at most so much: one update may not change everything."""
    general_loss_max: NotNegative = 1.0
    """The loss on general text may lie above the base's by at most so much."""
    preference_gain_min: float = 0.01
    """An update of comparisons and ratings alone: their loss on the new hold-out (DPO, KTO) must fall by so much."""
    preference_loss_max: NotNegative = 0.1
    """The loss on other held-out comparisons and ratings, past ones too, may rise by at most so much."""
    heldout_min: Count = 1
    """Fewer examples in the new hold-out than this: the gate cannot decide, and the candidate is not promoted."""


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One language model that is kept up to date."""

    base_path: Path
    """Directory of the base model (safetensors, tokenizer, configuration)."""
    engine: str
    """Name of the engine that serves it (`[engines.NAME]`)."""
    lora: Lora = Lora()
    training: Training = Training()
    strategy: list[Strategy] = []
    buffer: Buffer = Buffer()
    schedule: Schedule = Schedule()
    gate: Gate = Gate()
    tuning: Tuning = Tuning()
    parallel: Parallel = Parallel()
    rollout: Rollout = Rollout()
    general_directory: Path | None = None
    """General text (`*.txt`, paragraphs) to rehearse and to measure drift on; without it the base writes its own."""
    canary_prompts: list[str] = msgspec.field(
        default_factory=lambda: ["Who are you?", "What is the Library?", "Tell me something that I do not know."]
    )
    """Asked after every swap: the answers prove that the engine serves the new version."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count = 1
    """CPU threads of the trainer. More than the free cores is much slower than one."""
    warm_seconds: NotNegative = 0.0
    """After an update the next trainer waits so long with everything loaded, so that an update soon after begins
    seconds earlier; 0: none. It holds the base's memory meanwhile, on a GPU none of the GPU's."""
    seed: int = 0
    versions_kept: Annotated[int, msgspec.Meta(ge=2)] = 10
    """Older versions are removed, but never the live one, the one before it, or one that an engine lists."""


class Web(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The status page and `/metrics`."""

    listen: str = ""
    """`127.0.0.1:8787`; empty: no page. Loopback only: whoever reaches it can read it, so a proxy decides who does."""
    token_file: Path | None = None
    """File with the token that the page asks for before it acts (pause, update, roll back); none: it only shows."""


class Intake(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Feedback records over HTTP, for game servers: acknowledged once they are on disk in the drop directory."""

    socket: Path | None = None
    """Unix socket (mode 0660), e.g. `/run/eternad/feedback.sock`; none: records come by files alone."""
    listen: str = ""
    """`127.0.0.1:8788` beside or in the place of the socket, loopback only; needs `token_file`."""
    token_file: Path | None = None
    """File with the bearer token that requests to `listen` must show; the socket asks for none."""


class Gateway(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The front door for players' requests (`eternad gateway`): names that stay, versions that move behind them."""

    address: str = ""
    """`127.0.0.1:8080` or `unix:/run/eternad/gateway.sock`; empty: no gateway, engines move the names."""
    admin_socket: Path | None = None
    """Where the daemon changes the table; by default `gateway/admin.sock` in the state directory."""
    table_file: Path | None = None
    """The table; by default `gateway/aliases.json` in the state directory."""
    token_file: Path | None = None
    """File with the bearer token that clients must show; needed for an address that is not loopback."""
    sticky_header: str = "X-Session-Id"
    """Requests with the same value keep their version while two share a name; without it the field `user` decides."""
    connect_seconds: Positive = 2.0
    """An engine that takes no connection for so long is down."""
    silence_seconds: Positive = 300.0
    """An engine that sends nothing for so long has failed; the first token of a long prompt must come in time."""
    body_bytes_max: Count = 16 * 1024 * 1024
    """Larger requests are refused."""

    def admin_path(self, state_directory: Path) -> Path:
        """The admin socket's place."""
        return self.admin_socket or state_directory / "gateway" / "admin.sock"

    def table_path(self, state_directory: Path) -> Path:
        """The table's place."""
        return self.table_file or state_directory / "gateway" / "aliases.json"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    library_directory: Path
    """Where files are dropped: `content/MODEL/...`, `feedback/MODEL/SOURCE/...`, `eval/MODEL/...`."""
    state_directory: Path
    """Everything that the daemon keeps: database, runs, versions."""
    models: dict[str, Model]
    engines: dict[str, Engine]
    watch: Watch = Watch()
    trust: Trust = Trust()
    metrics: dict[str, Metric] = {}
    """What the metrics of feedback records mean."""
    web: Web = Web()
    intake: Intake = Intake()
    gateway: Gateway = Gateway()
    notify: Notify = Notify()
    gpu_lock_file: Path | None = None
    """A trainer holds a lock (`flock`) on this file: it waits for other programs that do, and they for it."""
    tick_seconds: Positive = 0.5
    """Pause between two turns of the daemon's loop."""
    hang_seconds: Positive = 300.0
    """A training child without progress for so long (or for ten times its median step) is ended."""
    run_attempts_max: Count = 3
    """A run that fails so often in a row quarantines its examples."""
    disk_free_bytes_min: NotNegative = 512 * 1024 * 1024
    """Below this no update starts."""
