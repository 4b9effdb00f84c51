"""The screen of `eternad status`: the whole pipeline at a glance. Starts without typer."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.cli import context, screen
from daemon.cli.screen import style

if TYPE_CHECKING:
    from daemon.config import Config
    from daemon.overview import LastRun, ModelNow, Overview, RunNow, TrialNow

GOOD = ("LIVE", "SUPERSEDED")


def print_status(config: Path | None, json: bool, watch: bool = False) -> None:
    """The command, once its options are known."""
    loaded = context.load(config)
    if watch:
        return _watch(loaded)
    overview = look(loaded)
    if json:
        return screen.json(overview)
    for line in lines(overview):
        screen.say(line)


def look(config: "Config") -> "Overview":
    """The overview now."""
    from daemon.overview import collect

    connection = context.database(config)
    try:
        return collect(config, connection, context.live(config))
    finally:
        connection.close()


def _watch(config: "Config") -> None:
    if not screen.is_terminal():
        while True:
            screen.say("\n".join([screen.clock(time.time()), *lines(look(config)), ""]))
            time.sleep(1)
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, screen=True) as display:
        while True:
            display.update(Text.from_ansi("\n".join(lines(look(config)))), refresh=True)
            time.sleep(1)


def lines(overview: "Overview") -> list[str]:
    """The screen of `status`, line by line."""
    found = [_daemon(overview), _disk(overview)]
    if overview.degraded:
        found.append(style(f"something is in the way: {screen.safe(overview.degraded)}", "red"))
    for model in overview.models:
        found += ["", *_model(model, overview.at)]
    if overview.quarantined:
        codes = ", ".join(f"{number} {code}" for code, number in sorted(overview.quarantined.items()))
        found += ["", style(f"quarantine: {codes}", "yellow") + "  (eternad quarantine ls)"]
    return found


def _daemon(overview: "Overview") -> str:
    if not overview.running:
        return style("eternad is not running", "red", "bold") + "; what follows is what it left. Start: eternad run"
    since = f", up {screen.duration(overview.at - overview.started_at)}" if overview.started_at else ""
    paused = style("; paused: all models", "yellow") if overview.paused else ""
    return style("eternad is running", "green", "bold") + f" (pid {overview.pid}{since}){paused}"


def _disk(overview: "Overview") -> str:
    free = f"{screen.size(overview.disk_free_bytes)} free"
    shown = style(f"{free}, too little: no update starts", "red") if overview.disk_low else free
    return f"library {overview.library_directory}, state {overview.state_directory} ({shown})"


def _model(model: "ModelNow", now: float) -> list[str]:
    found = [f"{style(model.name, 'bold')}  {_serving(model, now)}", f"  next    {_waiting(model, now)}"]
    if model.trial is not None:
        found.append(f"  trial   {trial_line(model.trial, now)}")
    if model.run is not None:
        found.append(f"  run     {run_line(model.run)}")
    if model.last is not None:
        found.append(f"  last    {_last(model.last, now)}")
    learned = sum(number for key, number in model.examples.items() if key.endswith("/consumed"))
    aside = sum(number for key, number in model.examples.items() if key.endswith("/rejected"))
    found.append(f"  learned {learned} examples" + (style(f", {aside} set aside", "yellow") if aside else ""))
    if model.search:
        found.append(style(f"  search  {screen.safe(model.search)}", "blue"))
    if model.quarantined:
        found.append(style(f"  quarantine {model.quarantined}", "yellow"))
    return found


def _serving(model: "ModelNow", now: float) -> str:
    wanted = "base model" if model.live_version is None else f"version {model.live_version}"
    since = f", live for {screen.duration(now - model.live_since)}" if model.live_since else ""
    text = f"{style(wanted, 'blue')}{since}; engine {model.engine}: "
    if model.engine_state == "unknown":
        return text + style("not asked", "dim")
    serves = "" if model.engine_serves is None else f", serves {screen.version(model.engine_serves)}"
    state = style(model.engine_state, "green" if model.engine_state == "ok" else "red")
    detail = f" ({screen.safe(model.engine_detail)})" if model.engine_detail and model.engine_state != "ok" else ""
    return text + state + serves + detail


def _waiting(model: "ModelNow", now: float) -> str:
    if model.paused:
        return style("paused", "yellow") + f"; {model.waiting.train} examples wait (eternad resume {model.name})"
    oldest = f", oldest {screen.ago(model.waiting.oldest_at, now)}" if model.waiting.oldest_at else ""
    return model.waiting.reason + oldest


def trial_line(trial: "TrialNow", now: float) -> str:
    """`version 3 canary 25 % (2 of 3) for 4 min, 120 requests: 360 s to go`."""
    step = "by hand" if trial.held else f"{trial.stage} of {trial.stages}"
    text = f"version {trial.version} {trial.kind} {trial.percent:g} % ({step}) for"
    text += f" {screen.duration(now - trial.stage_began_at)}, {trial.requests} requests"
    if trial.held:
        text += "; eternad promote or rollback ends it"
    return text + (f": {screen.safe(trial.reason)}" if trial.reason else "")


def run_line(run: "RunNow") -> str:
    """`npc-00004 TRAINING ####---- 45 % step 45/100 loss 1.23 312 tokens/s 12 s left`."""
    text, progress = f"{run.id} {run.state}", run.progress
    if progress is None:
        return text
    if progress.phase != "train" or not progress.steps:
        return f"{text} {progress.phase}"
    share = progress.step / progress.steps
    text += f" {screen.bar(share)} {share:.0%} step {progress.step}/{progress.steps}"
    text += "" if progress.loss is None else f" loss {progress.loss:.3f}"
    text += "" if progress.tokens_per_second is None else f" {progress.tokens_per_second:.0f} tokens/s"
    return text + ("" if progress.eta_seconds is None else f" {screen.duration(progress.eta_seconds)} left")


def _last(last: "LastRun", now: float) -> str:
    state = style(last.state, "green" if last.state in GOOD else "red")
    reason = f": {screen.safe(last.reason)}" if last.reason else ""
    return f"{last.id} {state} {screen.ago(last.ended_at, now)}{reason}"
