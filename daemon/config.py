"""The configuration: one TOML file, strict, every unit in a name.

A key that does not exist is an error that names the nearest one. Relative paths are relative to the file's directory.
The text under a field is its documentation: `eternad init` and `docs/configure.md` are made of it.
"""

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from buffers.policy import Buffer
from daemon import windows
from daemon.notify.settings import Notify, problem
from daemon.rollout import Rollout, stages
from daemon.trust.metric import Metric, trouble_with
from daemon.trust.policy import Source, Trust
from daemon.tuning_rules import Tuning
from strategies.catalog import BY_NAME, Count, NotNegative, Positive, Strategy, key_of
from strategies.parallel.choice import Parallel, four_bit_refusal, has_gpu, refusal
from strategies.request import Lora, Training

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
CREDENTIAL, UNIT_CREDENTIALS = "credential:", "/run/credentials/eternad.service"
LOOPBACK = re.compile(r"(127\.\d+\.\d+\.\d+|localhost|\[::1\]):\d{1,5}")


class ConfigError(Exception):
    """The configuration cannot be used; the message says what, where and what to do."""


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


def load(path: Path) -> Config:
    """Read and check a configuration file; raises `ConfigError` with what, where and what to do."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Write a first one with: eternad init {path}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        config = msgspec.convert(tree, Config, strict=True, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {explain(str(error))}") from None
    config = _absolute(config, path.parent.absolute())
    _check(config, path)
    return config


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and value.startswith(CREDENTIAL):
        directory = Path(os.environ.get("CREDENTIALS_DIRECTORY", UNIT_CREDENTIALS))
        return directory / f"eternad_{value.removeprefix(CREDENTIAL)}"
    if kind is Path:
        return Path(value).expanduser()
    raise TypeError(f"no {kind} in a configuration")


def fields_of(kind: type) -> list[str]:
    """The key names of one table of the configuration."""
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def explain(message: str) -> str:
    """msgspec's message with the table's name and, for an unknown key, the nearest one that exists."""
    found = re.search(r"unknown field `(.*?)`(?: - at `\$(.*)`)?", message)
    if found is None:
        return re.sub(r" - at `\$\.?(.*?)`", r" (at: \1)", message)
    key, place = found.group(1), (found.group(2) or "").lstrip(".")
    known = fields_of(_table(place))
    nearest = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else "known keys: " + ", ".join(known)
    return f"unknown key `{key}` in [{place or 'top level'}]; {hint}"


_TABLES: list[tuple[str, type]] = [
    (r"", Config), (r"watch", Watch), (r"trust", Trust), (r"web", Web), (r"intake", Intake), (r"gateway", Gateway),
    (r"trust\.sources.*", Source), (r"metrics.*", Metric), (r"engines.*", Engine), (r".*\.lora", Lora),
    (r".*\.tuning", Tuning), (r".*\.parallel", Parallel),
    (r"notify", Notify),
    (r".*\.training", Training), (r".*\.buffer", Buffer), (r".*\.schedule", Schedule), (r".*\.gate", Gate),
    (r".*\.rollout", Rollout), (r".*\.strategy.*", msgspec.Struct), (r"models.*", Model),
]  # fmt: skip


def _table(place: str) -> type:
    kind = next(kind for pattern, kind in _TABLES if re.fullmatch(pattern, place))
    if kind is not msgspec.Struct:
        return kind
    every = {name for strategy in BY_NAME.values() for name in fields_of(strategy)}
    return msgspec.defstruct("AnyStrategy", [(name, Any) for name in sorted(every)])


def _absolute(config: Config, directory: Path) -> Config:
    """Relative paths are relative to the configuration file, wherever the daemon was started."""

    def at(path: Path | None) -> Path | None:
        return None if path is None else directory / path

    replace = msgspec.structs.replace
    return replace(
        config,
        library_directory=directory / config.library_directory,
        state_directory=directory / config.state_directory,
        gpu_lock_file=at(config.gpu_lock_file),
        trust=replace(config.trust, blocklist_file=at(config.trust.blocklist_file)),
        web=replace(config.web, token_file=at(config.web.token_file)),
        intake=replace(config.intake, socket=at(config.intake.socket), token_file=at(config.intake.token_file)),
        notify=replace(
            config.notify,
            webhook_secret_file=at(config.notify.webhook_secret_file),
            apprise_file=at(config.notify.apprise_file),
        ),
        gateway=replace(
            config.gateway,
            admin_socket=at(config.gateway.admin_socket),
            table_file=at(config.gateway.table_file),
            token_file=at(config.gateway.token_file),
        ),
        models={
            name: replace(model, base_path=directory / model.base_path, general_directory=at(model.general_directory))
            for name, model in config.models.items()
        },
        engines={name: replace(engine, token_file=at(engine.token_file)) for name, engine in config.engines.items()},
    )


def _check(config: Config, path: Path) -> None:
    if not config.models:
        raise ConfigError(f"{path}: no model: add a table [models.NAME]")
    _check_names(config, path)
    if config.web.listen and not LOOPBACK.fullmatch(config.web.listen):
        raise ConfigError(f"{path}: [web] listen = `{config.web.listen}` must be a loopback address: `127.0.0.1:8787`")
    if (wrong := problem(config.notify)) is not None:
        raise ConfigError(f"{path}: [notify] {wrong}")
    _check_intake(config.intake, path)
    _check_gateway(config.gateway, path)
    for name, model in config.models.items():
        place = f"{path}: [models.{name}]"
        if model.engine not in config.engines:
            nearest = difflib.get_close_matches(model.engine, list(config.engines), 1, 0.3)
            hint = f"did you mean `{nearest[0]}`?" if nearest else f"add a table [engines.{model.engine}]"
            raise ConfigError(f"{place} engine = `{model.engine}` is not defined; {hint}")
        if not (model.base_path / "config.json").is_file():
            raise ConfigError(
                f"{place} base_path = {model.base_path} holds no model (no config.json there). Give the directory of a"
                " base model, or make the small example one: python -m strategies.from_gguf DIRECTORY"
            )
        names = ["".join(key_of(strategy)) for strategy in model.strategy]
        if twice := {each for each in names if names.count(each) > 1}:
            raise ConfigError(f"{place} strategy `{twice.pop().lower()}` is listed twice")
        _check_rollout(config, model, f"{place}.rollout")
        if reason := refusal(model.parallel, model.device, has_gpu()):
            raise ConfigError(f"{place}.parallel: {reason}")
        if model.training.quantize != "none" and (reason := four_bit_refusal(model.parallel)):
            raise ConfigError(f"{place}.training: {reason}")
        if (wrong := windows.problem(model.schedule.windows, model.schedule.blackouts)) is not None:
            raise ConfigError(f"{place}.schedule: {wrong}")
        if model.schedule.cron is not None:
            _check_cron(model.schedule.cron, f"{place}.schedule cron")


def _check_names(config: Config, path: Path) -> None:
    for name in (*config.models, *config.engines, *config.metrics):
        if not NAME.fullmatch(name):
            raise ConfigError(f"{path}: the name `{name}` must match {NAME.pattern}")
    for name, metric in config.metrics.items():
        if (wrong := trouble_with(metric)) is not None:
            raise ConfigError(f"{path}: [metrics.{name}] {wrong}")


def _check_intake(intake: Intake, path: Path) -> None:
    if intake.listen and not LOOPBACK.fullmatch(intake.listen):
        raise ConfigError(f"{path}: [intake] listen = `{intake.listen}` must be a loopback address: `127.0.0.1:8788`")
    if intake.listen and intake.token_file is None:
        raise ConfigError(
            f"{path}: [intake] listen needs `token_file`: any program of this machine reaches a port, whereas a socket"
            " has a group"
        )


def _check_gateway(gateway: Gateway, path: Path) -> None:
    is_local = not gateway.address or gateway.address.startswith("unix:/") or LOOPBACK.fullmatch(gateway.address)
    if not is_local and gateway.token_file is None:
        raise ConfigError(
            f"{path}: [gateway] address = `{gateway.address}` is open to other machines: give `token_file`, or an"
            " address of this machine such as `127.0.0.1:8080`"
        )


def _check_rollout(config: Config, model: Model, place: str) -> None:
    percentages = model.rollout.percentages
    if not percentages or percentages != sorted(set(percentages)):
        raise ConfigError(f"{place} percentages = {percentages}: give shares that grow, e.g. [5, 25, 50]")
    if not stages(model.rollout):
        return
    if not config.gateway.address or config.engines[model.engine].kind == "directory":
        raise ConfigError(
            f"{place} policy = `{model.rollout.policy}` splits requests, which only the gateway does: give [gateway]"
            " address and an engine that is reached over HTTP, or let the policy be `immediate`"
        )


def _check_cron(expression: str, place: str) -> None:
    from apscheduler.triggers.cron import CronTrigger

    try:
        CronTrigger.from_crontab(expression)
    except ValueError as error:
        raise ConfigError(f"{place} = `{expression}`: {error}. Five fields, e.g. `0 4 * * *`") from None
