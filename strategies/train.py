"""One whole update: `python -m strategies.train RUN_DIR`.

Reads `request.json` and `experience.jsonl` in RUN_DIR and leaves `adapter/`, `strategy/` and, last, `report.json`
there; files and exit codes are described in `strategies.request`.
"""

import os

# before torch is imported: spinning threads beside busy neighbours never end, and nothing here may ask the network
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import hashlib
import importlib.metadata
import resource
import sys
import traceback
from collections import defaultdict
from pathlib import Path
from typing import NoReturn

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor

from buffers import experience
from buffers.experience import Role, beside
from strategies import checkpoint, resume
from strategies.adapter import Adapter, load_adapter
from strategies.base_hash import base_sha256
from strategies.canary import canaries
from strategies.catalog import Replay
from strategies.course import train
from strategies.dataset import Item, tokenise
from strategies.derive import add_derived, derived_sha256
from strategies.distill import anchored
from strategies.evaluate import Probes, Standing, evaluation, has_token_loss, noise, standing
from strategies.failure import Failure
from strategies.forward import token_losses
from strategies.general import add_general
from strategies.history import (
    History,
    after_update,
    losses_by_row,
    read_history,
    sequence_metrics,
    write_history,
)
from strategies.mix import per_epoch
from strategies.parallel.choice import four_bit_refusal
from strategies.parallel.contract import Backend
from strategies.parallel.ddp import ProcessLost, is_process_lost
from strategies.parallel.opening import open_backend
from strategies.pulse import Interrupted, Pulse
from strategies.remembered import Remembered
from strategies.request import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TRAINED,
    Evaluation,
    RunReport,
    RunRequest,
    read_report,
    read_request,
    write,
)
from strategies.template import Template

REPORTED_ROLES: tuple[Role, ...] = ("new", "replay")
LIBRARIES = ("torch", "transformers", "peft", "avalanche-lib", "safetensors", "tokenizers")


def update(run_directory: Path, request: RunRequest, pulse: Pulse, backend: Backend) -> RunReport:
    """One update from request to report, in the order in which it happens. Raises `Failure`, `Interrupted`."""
    pulse.enter("load")
    torch.set_num_threads(request.threads)
    adapter, fresh = load(request)
    adapter.work_with(backend)
    items = read_items(run_directory, request, adapter)
    add_derived(items, run_directory, request, adapter, on_progress=lambda: pulse.enter("load"))
    add_general(items, request, adapter, on_progress=lambda: pulse.enter("load"))
    items["general"] = anchored(items["general"], request.strategies)
    probes = take_probes(items)

    pulse.enter("baseline")
    with adapter.disabled():
        base = standing(adapter, probes, remembered(request, adapter))
    # a fresh adapter answers like the base: B = 0
    before = base if request.parent_version is None else standing(adapter, probes, remembered(request, adapter))
    # how far the cut of the passes moves a mean: asked here, where nobody waits for a verdict yet
    floor = noise(adapter, probes, before.scores)

    pulse.enter("train")
    template = train(run_directory, request, adapter, items, probes, pulse, fresh if request.rebase else None)

    pulse.enter("evaluate")
    judged, known = examine(run_directory, request, adapter, probes, (base, before), floor)
    answers = canaries(adapter, request.canary_prompts)
    losses = example_losses(run_directory, adapter, items) if request.report_losses else []

    pulse.enter("save")
    save(run_directory, request, template, known)
    seconds = pulse.finish()
    position = template.position
    return RunReport(
        run_id=request.run_id,
        status="trained",
        examples=count(items, request),
        replay_ratio=replay_ratio(items, request),
        steps=position.step,
        epochs=position.step / template.steps * template.train_epochs,
        stopped_early=position.stopped_early,
        tokens=position.tokens,
        seconds=seconds,
        tokens_per_second=position.tokens / max(seconds["train"], 1e-9),
        losses=position.losses,
        example_losses=losses,
        example_tokens=example_tokens(run_directory, items),
        evaluation=judged,
        canaries=answers,
        strategies=position.counters,
        peak_memory_bytes=peak_memory_bytes(),
        backend=backend.name,
        processes=backend.size,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        derived_sha256=derived_sha256(run_directory),
        base_sha256=base_sha256(request.base_path, request.general_cache),
    )


def load(request: RunRequest) -> tuple[Adapter, Tensor]:
    """The base model with the parent's adapter, or a fresh one; (parameters,) the weights of a fresh one."""
    adapter = load_adapter(
        request.base_path, request.lora, precision=request.training.precision, device=request.device,
        seed=request.seed, quantize=request.training.quantize,
    )  # fmt: skip
    fresh = adapter.flat.clone()
    if request.parent_version is not None:
        adapter.load(request.parent_version)
    return adapter, fresh


def read_items(run_directory: Path, request: RunRequest, adapter: Adapter) -> dict[Role, list[Item]]:
    """The tokenised rows of `experience.jsonl` by role."""
    path = run_directory / "experience.jsonl"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise Failure("experience_unreadable", f"cannot read {path}: {error}") from error
    if digest != request.experience_sha256:
        raise Failure("experience_damaged", f"{path} is not what the request names; cut the experience again")
    items: dict[Role, list[Item]] = defaultdict(list)
    for index, row in enumerate(experience.read(path)):
        items[row.role].append(tokenise(row, index, adapter.tokenizer, request.training.sequence_tokens))
    return items


def remembered(request: RunRequest, adapter: Adapter) -> Remembered | None:
    """What the present weights have said before; not where several processes have a part of it each."""
    if request.general_cache is None or adapter.backend.size > 1:
        return None
    sha256 = base_sha256(request.base_path, request.general_cache)
    return Remembered(request.general_cache / "standing", adapter, sha256)


def take_probes(items: dict[Role, list[Item]]) -> Probes:
    """The rows to evaluate on."""
    old: dict[int, list[Item]] = defaultdict(list)
    for item in items["heldout_old"]:
        old[item.update].append(item)
    return Probes(new=items["heldout_new"], old=dict(old), eval=items["eval"], general=items["probe"])


def example_losses(run_directory: Path, adapter: Adapter, items: dict[Role, list[Item]]) -> list[tuple[int, float]]:
    """(row of the journal, nats per token) of every new and replayed example that has a token loss."""
    ids = [row.id for row in experience.read(run_directory / "experience.jsonl")]
    trained = [item for role in REPORTED_ROLES for item in items[role] if has_token_loss(item)]
    losses = token_losses(adapter, trained).tolist()
    return [(ids[item.index], loss) for item, loss in zip(trained, losses, strict=True)]


def example_tokens(run_directory: Path, items: dict[Role, list[Item]]) -> list[tuple[int, int]]:
    """(row of the journal, tokens) of every new example, as it was trained on."""
    ids = [row.id for row in experience.read(run_directory / "experience.jsonl")]
    return [(ids[item.index], len(item.tokens)) for item in items["new"]]


def examine(
    run_directory: Path,
    request: RunRequest,
    adapter: Adapter,
    probes: Probes,
    earlier: tuple[Standing, Standing],
    floor: float,
) -> tuple[Evaluation, History]:
    """What the gate judges, with what all updates so far have done to each other; and the history to go on from.

    `earlier`: the standing of the base and of the version before.
    """
    ids = [row.id for row in experience.read(run_directory / "experience.jsonl")]
    (base, before), history = earlier, read_history(request.parent_version)
    after = standing(adapter, probes, remembered(request, adapter))
    now, of_base, of_before = (losses_by_row(probes, each.scores, ids) for each in (after, base, before))
    found = sequence_metrics(history, now, of_base, of_before, request.update_number, request.seed)
    judged = evaluation(
        adapter, probes, base, before, after, request.seed, floor, request.training.preference_beta
    )  # fmt: skip
    return msgspec.structs.replace(judged, sequence=found), after_update(history, request.update_number, now)


def save(run_directory: Path, request: RunRequest, template: Template, history: History) -> None:
    """Adapter and states of the methods, each file fsynced; the checkpoint is of no more use."""
    backend = template.adapter.backend
    moments = backend.moments() if request.training.keep_optimizer else {}
    if backend.rank:
        return
    if not template.adapter.is_finite():
        raise Failure("non_finite_weights", "the trained adapter holds NaN or infinity; lower learning_rate")
    template.adapter.save(run_directory / "adapter")
    checkpoint.save_states(run_directory / "strategy", template.learners)
    write_history(run_directory / "strategy", history)
    if request.training.keep_optimizer:
        checkpoint.save_optimizer(run_directory / "strategy", moments)


def count(items: dict[Role, list[Item]], request: RunRequest) -> dict[str, int]:
    """Rows by role, those that were cut to `sequence_tokens`, and what the replay of an epoch fell short of."""
    ratio = next((strategy.ratio for strategy in request.strategies if isinstance(strategy, Replay)), 0.0)
    wanted = beside(len(items["new"]), ratio)
    return {
        **{str(role): len(rows) for role, rows in items.items() if rows},
        "cut": sum(item.was_cut for rows in items.values() for item in rows),
        "shortfall": max(wanted - len(items["replay"]), 0),
    }


def replay_ratio(items: dict[Role, list[Item]], request: RunRequest) -> float:
    """Share of replayed rows among the new and replayed ones of an epoch; of all rows in a rebase."""
    shown = {} if request.rebase else per_epoch(items, request.strategies)
    replayed = shown.get("replay", len(items["replay"]))
    return replayed / max(len(items["new"]) + replayed, 1)


def peak_memory_bytes() -> int:
    """Of this process; of the GPU where one was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(run_directory: Path, pulse: Pulse) -> RunReport:
    """The report of the run, whatever happens; only `Interrupted` and `ProcessLost` leave without one."""
    run_id = run_directory.name
    try:
        request = read_request(run_directory)
        run_id = request.run_id
        if request.training.quantize != "none" and (reason := four_bit_refusal(request.parallel)):
            raise Failure("bad_quantize", reason)
        backend = open_backend(request.parallel, request.device)
        pulse.join(backend)
        report = update(run_directory, request, pulse, backend)
        backend.close()
        return report
    except Failure as failure:
        code, reason = failure.code, failure.reason
    except (OSError, msgspec.MsgspecError, SafetensorError) as error:
        code = "disk_full" if resume.is_disk_full(error) else "bad_input"
        reason = f"{run_directory}: {error}"
    except (RuntimeError, MemoryError, ValueError, KeyError, TypeError) as error:
        traceback.print_exc()
        if is_process_lost(error):
            raise ProcessLost(str(error)) from error
        code = "oom" if resume.is_out_of_memory(error) else "internal"
        reason = f"{type(error).__name__}: {error}; the traceback is in the log of the run"
    return RunReport(run_id=run_id, status="failed", code=code, reason=reason, seconds=pulse.finish())


def main(run_directory: Path) -> int:
    """Do the run; returns the exit code. A run that has its report is not done again."""
    pulse = Pulse(run_directory)
    report = read_report(run_directory)
    if report is None:
        pulse.listen()
        try:
            report = attempt(run_directory, pulse)
        except Interrupted:
            return EXIT_INTERRUPTED
        except ProcessLost as lost:  # no fault of the run: it may go on from its checkpoint
            print(f"eternad: another process of this run is gone or does not answer: {lost}", file=sys.stderr)
            return EXIT_FAILED
    conclude(run_directory, pulse, report)
    return EXIT_TRAINED if report.status == "trained" else EXIT_FAILED


def conclude(run_directory: Path, pulse: Pulse, report: RunReport) -> None:
    """The report, if it is this process's to write, and the checkpoint is of no more use.

    Of several processes the first one reports success; the first to fail says why, the others only miss it.
    """
    known = read_report(run_directory)
    if known is None and (pulse.writes or report.status == "failed"):
        write(run_directory / "report.json", report)
    if pulse.writes or report.status == "failed":
        checkpoint.remove_checkpoint(run_directory)


def leave(code: int) -> NoReturn:
    """End this process. Alone, without tearing down an interpreter full of torch: 1.5 CPU seconds between the report,
    which is on disk, and the swap. Several processes take leave of each other."""
    if not {"WORLD_SIZE", "HOROVOD_SIZE"} & os.environ.keys():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m strategies.train RUN_DIR")
    leave(main(Path(sys.argv[1])))
