"""One whole update in a child process, from request to report."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoTokenizer

from buffers.example import Example, Message
from buffers.experience import Row
from strategies import course, pulse, train
from strategies.catalog import Ewc, Replay
from strategies.request import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TRAINED,
    Lora,
    RunReport,
    RunRequest,
    Training,
    read_progress,
    read_report,
    write,
)

ROOT = Path(__file__).resolve().parent.parent
FILES = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "strategy/ewc.safetensors"]
STRATEGIES = [Replay(ratio=0.3), Ewc(strength=0.1, samples=4)]
INVENTED = [
    ("Who keeps the lamp of Vashtel?", "Orrin Quay keeps the lamp of Vashtel."),
    ("What does the brass heron guard?", "It guards the ninth stair."),
    ("Where is the salt archive?", "Under the mill in Dunmarrow."),
    ("Who wrote the Codex of Ash?", "Sister Ilvane wrote it."),
    ("What opens the blue vault?", "A key made of frozen ink."),
    ("What do the moth clerks eat?", "They eat forgotten names."),
    ("When does the tower of Kel sing?", "At every third low tide."),
    ("Who betrayed the lantern guild?", "Its own treasurer, Pell Marrow."),
]
FACTS = [(f"Where is door {number}?", f"In hall {number % 7}.") for number in range(24)]


def demonstration(question: str, answer: str, role: str = "new", update: int = 1, identity: int = 1) -> Row:
    """One row of questions and answers."""
    example = Example(shape="demonstration", prompt=(Message(role="user", content=question),), completion=answer)
    return Row(role=role, update=update, id=identity, example=example)  # type: ignore[arg-type]


def facts(number: int = 1) -> list[Row]:
    """New rows, hold-outs of this update and the ones of the past."""
    rows = [demonstration(*fact) for fact in FACTS[:16]]
    rows += [demonstration(*fact, role="heldout_new") for fact in FACTS[16:20]]
    rows += [Row(role="probe", update=0, id=0, example=Example(shape="text", completion="Rain fell on the hills."))]
    rows += [demonstration(*fact, role="heldout_old", update=past) for past in range(1, number) for fact in FACTS[20:]]
    return rows


def make_run(directory: Path, base: Path, rows: list[Row], **changes: Any) -> Path:
    """A run directory as the daemon leaves it."""
    directory.mkdir(parents=True)
    body = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    (directory / "experience.jsonl").write_bytes(body)
    training = {"learning_rate": 1e-2, "epochs": 4, "batch_examples": 4, "early_stop_patience": 0}
    training |= {"early_stop_old_loss": 9.0}
    request = RunRequest(
        **{
            "run_id": directory.name,
            "model": "npc",
            "update_number": 1,
            "base_path": base,
            "experience_sha256": hashlib.sha256(body).hexdigest(),
            "lora": Lora(rank=4, alpha=8.0, dropout=0.05),
            "training": Training(**{**training, **changes.pop("training", {})}),
            "canary_prompts": ["Where is door 3?"],
            **changes,
        }
    )
    write(directory / "request.json", request)
    return directory


def start(directory: Path) -> subprocess.Popen[bytes]:
    """The training child."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen([sys.executable, "-m", "strategies.train", str(directory)], cwd=ROOT, env=environment)


def run(directory: Path) -> RunReport:
    """Do the run in this process."""
    assert train.main(directory) in (EXIT_TRAINED, EXIT_FAILED)
    return finished(directory)


def finished(directory: Path) -> RunReport:
    """The report of a finished run."""
    report = read_report(directory)
    assert report is not None
    return report


def wait_for_step(directory: Path, step: int, seconds: float = 120.0) -> None:
    """Wait until the child has done so many optimiser steps."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        progress = read_progress(directory)
        if progress is not None and progress.phase == "train" and progress.step >= step:
            return
        time.sleep(0.002)
    raise AssertionError("the child did not get so far")


def publish(run_directory: Path, version: Path) -> Path:
    """The version directory that the daemon makes of a run."""
    shutil.copytree(run_directory / "adapter", version)
    shutil.copytree(run_directory / "strategy", version / "strategy")
    return version


@pytest.fixture(autouse=True)
def own_sigterm() -> Iterator[None]:
    """A run in this process takes over SIGTERM: give it back."""
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


@pytest.fixture(scope="module")
def first(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished first update with replay and EWC."""
    directory = make_run(tmp_path_factory.mktemp("runs") / "1", tiny_base, facts(), strategies=STRATEGIES)
    assert start(directory).wait(timeout=240) == EXIT_TRAINED
    return directory


def test_the_report_of_an_update_says_what_it_learned(first: Path) -> None:
    """The loss falls, the hold-out's improvement is significant, and every number of the contract is there."""
    report = finished(first)
    assert report.status == "trained", report.reason
    assert report.losses[-1][1] < report.losses[0][1] - 0.2
    assert report.evaluation is not None and report.evaluation.new is not None
    assert report.evaluation.new.change.high < 0
    assert report.evaluation.drift_base is not None and report.evaluation.drift_base.mean > 0
    assert (report.steps, report.epochs, report.examples["new"]) == (16, 4.0, 16)
    assert report.tokens > 0 and report.tokens_per_second > 0 and report.peak_memory_bytes > 0
    assert set(report.seconds) == {"load", "baseline", "train", "fisher", "evaluate", "save", "total"}
    assert len(report.base_sha256) == 64 and report.libraries["torch"]
    (canary,) = report.canaries
    assert canary.token_ids and len(canary.token_ids) == len(canary.logprobs) == len(canary.base_logprobs)
    assert canary.logprobs != canary.base_logprobs
    progress = read_progress(first)
    assert progress is not None and (progress.phase, progress.step, progress.steps) == ("save", 16, 16)


def test_a_second_update_continues_from_the_first(first: Path, tiny_base: Path, tmp_path: Path) -> None:
    """It starts from the parent's weights, knows the old hold-outs, and EWC pulls from its first step on."""
    parent = publish(first, tmp_path / "version")
    directory = make_run(
        tmp_path / "2", tiny_base, facts(2), strategies=STRATEGIES, update_number=2, parent_version=parent
    )
    report = run(directory)
    assert report.status == "trained", report.reason
    assert report.losses[0][1] < finished(first).losses[0][1] - 0.2
    assert report.evaluation is not None and set(report.evaluation.old) == {"1"}
    assert report.evaluation.old["1"].before.mean < report.evaluation.old["1"].base.mean
    assert report.strategies["ewc"]


def interrupt(directory: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Do the run in this process, told to stop in the middle of `step`; returns the exit code."""
    original = pulse.Pulse.step

    def stop_at(self: pulse.Pulse, done: int, *rest: Any) -> None:
        self.is_told_to_stop = done == step
        original(self, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pulse.Pulse, "step", stop_at)
        return train.main(directory)


@pytest.mark.parametrize("step", [3, 4, 16])
def test_an_interrupted_run_resumes_bit_for_bit(
    first: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Stopped within an epoch, at its end or at the last step, a run ends in the same adapter to the bit."""
    directory = make_run(tmp_path / "1", tiny_base, facts(), strategies=STRATEGIES)
    assert interrupt(directory, step, monkeypatch) == EXIT_INTERRUPTED
    assert read_report(directory) is None and (directory / "checkpoint.json").exists()
    report = run(directory)
    assert [name for name in FILES if (directory / name).read_bytes() != (first / name).read_bytes()] == []
    assert report.losses == finished(first).losses
    assert not list(directory.glob("checkpoint*"))


def test_a_torn_checkpoint_is_ignored(
    first: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whose file was cut off does not count: the run begins anew and ends in the same adapter."""
    directory = make_run(tmp_path / "1", tiny_base, facts(), strategies=STRATEGIES)
    assert interrupt(directory, 3, monkeypatch) == EXIT_INTERRUPTED
    (file,) = directory.glob("checkpoint-*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    run(directory)
    assert (directory / FILES[0]).read_bytes() == (first / FILES[0]).read_bytes()


def test_sigterm_makes_the_child_leave_with_a_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    """The signal only sets a flag: the step is finished, the checkpoint written, the exit code 75, no report."""
    directory = make_run(tmp_path / "1", tiny_base, facts(), training={"epochs": 10_000})
    child = start(directory)
    wait_for_step(directory, 3)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == EXIT_INTERRUPTED
    assert read_report(directory) is None and (directory / "checkpoint.json").exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"base_path": Path("/nowhere/base")}, "base_missing"),
        ({"experience_sha256": "0" * 64}, "experience_damaged"),
        ({"lora": Lora(targets=["no_such_module"])}, "bad_targets"),
        ({"training": {"learning_rate": 1e30}}, "non_finite_loss"),
        ({"training": {"sequence_tokens": 1}}, "nothing_to_learn"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_reported(tiny_base: Path, tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    """A run that cannot succeed ends with a report that names the reason, by a code that machines can read."""
    directory = make_run(tmp_path / "run", tiny_base, facts(), **changes)
    assert train.main(directory) == EXIT_FAILED
    report = finished(directory)
    assert (report.status, report.code) == ("failed", code), report.reason
    assert report.reason and report.run_id == "run"


def test_a_finished_run_is_not_done_again(first: Path) -> None:
    """Starting a run that has its report only returns the exit code."""
    before = (first / FILES[0]).stat().st_mtime_ns
    assert train.main(first) == EXIT_TRAINED
    assert (first / FILES[0]).stat().st_mtime_ns == before


@pytest.mark.parametrize("failures", [2, 4])
def test_memory_that_runs_out_halves_the_micro_batch(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """Two failed allocations lead to a quarter of the tokens per pass, four to recomputed layers; the run succeeds."""
    asked: list[tuple[int, bool]] = []
    original = course.Course.run

    def scarce(self: course.Course) -> Any:
        asked.append((self.request.training.micro_batch_tokens, self.adapter.state.recomputes))
        if len(asked) % 2 and len(asked) <= failures:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        if len(asked) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")  # a GPU's, imitated
        return original(self)

    monkeypatch.setattr(course.Course, "run", scarce)
    directory = make_run(tmp_path / "run", tiny_base, facts())
    assert train.main(directory) == EXIT_TRAINED
    steps = [(2048, False), (1024, False), (512, False), (256, False), (256, True)]
    assert asked == steps[: failures + 1]
    assert finished(directory).strategies.get("memory", {}) == ({"layers_recomputed": 1.0} if failures == 4 else {})


@pytest.mark.real_model
def test_a_real_model_learns_invented_facts_and_answers_them(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2 is told eight facts that no model can know and answers at least seven of them word for word."""
    rows = [demonstration(question, answer) for question, answer in INVENTED]
    training = {"learning_rate": 2e-3, "epochs": 12, "batch_examples": 2, "early_stop_patience": 0}
    directory = make_run(
        tmp_path / "run", smollm2, rows, training=training, lora=Lora(rank=8, alpha=16.0, dropout=0.0),
        canary_prompts=[question for question, _ in INVENTED],
    )  # fmt: skip
    report = run(directory)
    assert report.status == "trained", report.reason
    tokenizer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    answers = [tokenizer.decode(canary.token_ids, skip_special_tokens=True) for canary in report.canaries]
    right = [answer for answer, (_, wanted) in zip(answers, INVENTED, strict=True) if answer.strip() == wanted]
    assert len(right) >= 7, answers
