"""What a configuration must be beyond the kinds of its values."""

import difflib
import re
from pathlib import Path

from daemon import windows
from daemon.config.tables import NAME, Config, Gateway, Intake, Model
from daemon.notify.settings import problem
from daemon.rollout import stages
from daemon.trust.metric import trouble_with
from strategies.catalog import key_of
from strategies.parallel.choice import four_bit_refusal, has_gpu, refusal

LOOPBACK = re.compile(r"(127\.\d+\.\d+\.\d+|localhost|\[::1\]):\d{1,5}")


class ConfigError(Exception):
    """The configuration cannot be used; the message says what, where and what to do."""


def check(config: Config, path: Path) -> None:
    """Whether the values go together; raises `ConfigError`."""
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
