"""Runs an update in a child process: `python -m strategies.train RUN_DIR`.

A lock on `RUN_DIR/lock`, taken here and inherited by the child, lives exactly as long as the child does: whoever finds
it taken knows that the run is being worked on, also after the daemon was killed and started again.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import msgspec

from buffers.experience import Recipe
from daemon import standby as standbys
from daemon.config import Model
from daemon.standby import Standby, environment
from strategies.catalog import AGem, Gem, Replay
from strategies.parallel import launch
from strategies.request import (
    EXIT_INTERRUPTED,
    Progress,
    RunReport,
    RunRequest,
    read_progress,
    read_report,
    read_request,
    write,
)

COMMAND = [sys.executable, "-m", launch.ALONE]
"""Of one process; see `strategies.parallel.launch` for several."""
MEDIAN_STEPS_BEFORE_HANG = 10
OWN_WORDS, LAUNCHER_LINES = "eternad: ", 200
"""What a trainer of several processes says at the end begins so; torchrun's report follows, this long at most."""
BATCHES = 16
"""GEM and A-GEM draw each batch of a past update from so many batches' worth of it."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """How a training child ended."""

    outcome: Literal["trained", "failed", "interrupted", "died"]
    code: str = ""
    reason: str = ""
    report: RunReport | None = None


def is_rebase(model: Model, update_number: int) -> bool:
    """Whether this update is one that begins with a fresh adapter; the first one does so anyway."""
    every = model.training.rebase_every_updates
    return every > 0 and update_number > 1 and update_number % every == 0


def recipe_of(model: Model, *, rebase: bool = False) -> Recipe:
    """What an experience must contain for the strategies of a model."""
    chosen = {type(strategy): strategy for strategy in model.strategy}
    replay, gem, agem = chosen.get(Replay), chosen.get(Gem), chosen.get(AGem)
    memory_updates = gem.constraints if isinstance(gem, Gem) else 8 if agem is not None else 0
    remembering = [each for each in (gem, agem) if isinstance(each, Gem | AGem)]
    return Recipe(
        epochs=model.training.epochs,
        replay_ratio=replay.ratio if isinstance(replay, Replay) else 0.0,
        whole_buffer=rebase,
        general_ratio=replay.general_ratio if isinstance(replay, Replay) else 0.0,
        general_directory=model.general_directory,
        buffer=model.buffer,
        memory_updates=memory_updates,
        memory_examples=BATCHES * max(each.examples for each in remembering) if remembering else 0,
        seed=model.seed,
    )


def request_of(
    model: Model,
    *,
    run_id: str,
    name: str,
    update_number: int,
    parent: Path | None,
    experience_sha256: str,
    cache: Path,
    rebase: bool = False,
) -> RunRequest:
    """The request of a run, out of the configuration as it stands when the run begins."""
    return RunRequest(
        run_id=run_id, model=name, update_number=update_number, base_path=model.base_path, parent_version=parent,
        rebase=rebase and parent is not None, experience_sha256=experience_sha256, lora=model.lora,
        training=model.training, strategies=model.strategy,
        general_cache=cache, canary_prompts=model.canary_prompts, seed=model.seed, threads=model.threads,
        device=model.device, parallel=model.parallel, report_losses=model.buffer.policy == "surprise",
    )  # fmt: skip


class Trainer:
    """The child process of one run, started here or found running after a restart of the daemon."""

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory
        self._process: subprocess.Popen[bytes] | None = None
        self._steps: list[float] = []  # seconds between the last progress reports
        self._last: Progress | None = None
        self._seen_at = time.monotonic()
        self._asked_to_stop = False
        self._memory_kills = 0  # of the whole machine, when the child was started

    def prepare(self, request: RunRequest) -> None:
        """`request.json` in place: the run keeps the configuration that it began with."""
        write(self.run_directory / "request.json", request)

    def start(self, *inherited: int, standby: Standby | None = None) -> None:
        """Start the child, unless one is at work on this run already. Its output goes to `train.log`.

        `inherited`: descriptors of locks that it shall hold as long as it lives; `standby`: a child that waits for it.
        """
        lock = self._lock()
        if lock is None:
            if standby is not None:
                standby.dismiss()
            return
        self._memory_kills = memory_kills()
        try:
            with (self.run_directory / "train.log").open("ab") as log:
                taken = None if standby is None else standby.take(self.run_directory, log, lock, *inherited)
                if taken is not None:
                    os.pwrite(lock, str(taken.pid).encode(), 0)  # its command line does not name the run
                self._process = taken or subprocess.Popen(
                    command_of(self.run_directory),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(),
                    start_new_session=True,  # its own group: a signal to the daemon's terminal is not one to the child
                    pass_fds=(lock, *inherited),
                )  # fmt: skip
        finally:
            os.close(lock)
        self._seen_at = time.monotonic()

    def _lock(self) -> int | None:
        """The descriptor of the run's lock, or None when a child holds it."""
        return take_lock(self.run_directory / "lock")

    @property
    def pid(self) -> int | None:
        """The child's process id; None when nothing runs."""
        if self._process is not None and self._process.poll() is None:
            return self._process.pid
        return find_trainer(self.run_directory)

    def finished(self) -> Finished | None:
        """How the child ended, or None while it is at work. Never waits."""
        status = self._process.poll() if self._process is not None else None
        if self._process is not None and status is None:
            return None
        if self._process is None:
            lock = self._lock()
            if lock is None:
                return None
            os.close(lock)
        report = read_report(self.run_directory)
        if report is not None and report.status == "trained":
            return Finished(outcome="trained", report=report)
        if report is not None:
            return Finished(outcome="failed", code=report.code, reason=report.reason, report=report)
        return self._without_report(status)

    def _without_report(self, status: int | None) -> Finished:
        # before its handler is in place, SIGTERM simply ends it: there was nothing to checkpoint yet
        # a launcher of several processes has exit codes of its own
        is_launcher = status not in (0, None) and command_of(self.run_directory)[:-1] != COMMAND
        if status == EXIT_INTERRUPTED or (self._asked_to_stop and (status == -signal.SIGTERM or is_launcher)):
            return Finished(outcome="interrupted")
        if (status == -signal.SIGKILL or is_launcher) and memory_kills() > self._memory_kills:
            return Finished(outcome="died", code="oom", reason="the kernel ended the trainer: memory had run out")
        how = "was gone when the daemon came back" if status is None else _describe(status)
        return Finished(outcome="died", code="died", reason=f"the trainer {how}; {tail(self.run_directory)}")

    def hangs(self, hang_seconds: float) -> bool:
        """No progress for `hang_seconds`, or for ten times the usual pause between two reports if that is longer."""
        now, progress = time.monotonic(), read_progress(self.run_directory)
        if progress is not None and progress != self._last:
            self._steps = [*self._steps[-50:], now - self._seen_at]
            self._last, self._seen_at = progress, now
        usual = sorted(self._steps)[len(self._steps) // 2] if self._steps else 0.0
        return now - self._seen_at > max(hang_seconds, MEDIAN_STEPS_BEFORE_HANG * usual)

    def stop(self, seconds: float) -> None:
        """SIGTERM: the child checkpoints and exits 75; SIGKILL to its whole group after `seconds`."""
        pid = self.pid
        if pid is None:
            return
        self._asked_to_stop = True
        _signal(pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while self.pid is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the child's process group."""
        if (pid := self.pid) is not None:
            _signal(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()


def take_lock(path: Path) -> int | None:
    """The descriptor of a lock on a file (made if it is missing), or None when somebody else holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def clear(run_directory: Path) -> None:
    """Start over: forget what an earlier attempt wrote, keep the experience and the request."""
    for name in ("report.json", "progress.json"):
        (run_directory / name).unlink(missing_ok=True)
    for name in ("adapter", "strategy", "checkpoint"):
        shutil.rmtree(run_directory / name, ignore_errors=True)


def memory_kills() -> int:
    """Processes that the kernel has ended for want of memory since the machine started (`oom_kill`, proc_vmstat(5))."""
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counters.get("oom_kill", 0))


def use_less_memory(run_directory: Path) -> None:
    """Start over with half the tokens in a forward pass and the same steps: a checkpoint was cut differently."""
    request = read_request(run_directory)
    tokens = max(request.training.micro_batch_tokens // 2, 1)
    training = msgspec.structs.replace(request.training, micro_batch_tokens=tokens)
    clear(run_directory)
    write(run_directory / "request.json", msgspec.structs.replace(request, training=training))


def command_of(run_directory: Path) -> list[str]:
    """What to start for this run: `COMMAND`, or the launcher of its executor."""
    try:
        parallel = read_request(run_directory).parallel
    except (FileNotFoundError, msgspec.MsgspecError):  # the child says what is wrong with it
        return [*COMMAND, str(run_directory)]
    if parallel.executor == "process":
        return [*COMMAND, str(run_directory)]
    return launch.command(parallel, run_directory)


def find_trainer(run_directory: Path) -> int | None:
    """The pid of a trainer that works on this run: one that an earlier daemon has started.

    By its command line; a standby that took the run over is named in the run's lock.
    """
    holder = _holder(run_directory / "lock")
    modules = {os.fsencode(name) for name in (COMMAND[-1], *launch.MODULES)}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            is_ours = command[-2:-1] and command[-2] in modules and command[-1] == os.fsencode(run_directory)
            is_ours = is_ours or (entry.name == holder and os.fsencode(standbys.MODULE) in command)
            if is_ours and "\nState:\tZ" not in (entry / "status").read_text():
                return int(entry.name)
        except OSError:
            continue  # it ended while we looked
    return None


def _holder(lock: Path) -> str:
    """The process id in a run's lock; empty where the trainer was started for this run."""
    try:
        return lock.read_text("ascii")
    except FileNotFoundError:
        return ""


def tail(run_directory: Path, lines: int = 3) -> str:
    """The last words of the trainer, for an error message; where it speaks itself, not what a launcher adds."""
    try:
        text = (run_directory / "train.log").read_text("utf-8", "replace").strip().splitlines()
    except FileNotFoundError:
        return "it wrote no log"
    if own := [line.removeprefix(OWN_WORDS) for line in text[-LAUNCHER_LINES:] if line.startswith(OWN_WORDS)]:
        return own[0]
    return "its last words: " + " | ".join(text[-lines:]) if text else "it wrote nothing to train.log"


def _describe(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status} and wrote no report"


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended by itself
