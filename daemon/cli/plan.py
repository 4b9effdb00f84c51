"""`eternad plan`: memory and time of an update, before it is started."""

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli import context, options, screen
from daemon.cli.failure import FAILED, USAGE, Failure

if TYPE_CHECKING:
    from daemon.plan import Plan


def plan(
    model: options.ModelArgument,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs of this machine; 0: the CPU.")] = 0,
    gpu_memory: Annotated[float | None, typer.Option("--gpu-memory-gib", help="Memory of one GPU.")] = None,
    sequence: Annotated[int | None, typer.Option("--sequence", min=1, help="Tokens of an example.")] = None,
    tflops: Annotated[float | None, typer.Option("--tflops", help="What one device sustains.")] = None,
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
) -> None:  # fmt: skip
    """Compute memory and time of an update of MODEL.

    From the base's configuration alone; nothing is loaded.
    """
    from daemon import plan as planning

    if gpu_memory is not None and not gpus:
        raise Failure("--gpu-memory-gib says nothing without --gpus", USAGE)
    loaded = context.load(config)
    name = context.model_name(loaded, model)
    rate = None if tflops is None else tflops * 1e12
    try:
        found = planning.plan(
            name, loaded.models[name], gpus=gpus, gpu_memory_gib=gpu_memory, sequence=sequence, flops=rate
        )
    except planning.CannotPlan as error:
        raise Failure(str(error), FAILED) from None
    screen.json(found) if json else _print(found, is_assumed=tflops is None)


def _print(found: "Plan", *, is_assumed: bool) -> None:
    import msgspec

    load = found.load
    precision = "bfloat16" if load.bytes_per_weight == 2 else "float32"
    precision = precision if load.quantize == "none" else f"4 bits, multiplied in {precision}"
    screen.say(
        f"{found.model}: {found.parameters / 1e6:,.1f} M parameters in {precision}, adapter of rank {load.rank}:"
        f" {found.adapter_parameters / 1e6:,.2f} M; {load.micro_batch_tokens} tokens per forward pass,"
        f" sequences of {load.sequence_tokens}"
    )
    rows = [[name, screen.size(held)] for name, held in msgspec.structs.asdict(found.memory).items()]
    screen.table(["MEMORY", "COMPUTED"], [*rows, ["all", screen.size(found.memory_total)]], "")
    assumed = "assumed" if is_assumed else "given"
    work = f"{found.flops_per_token / 1e9:.3g} GFLOP per token x {load.passes:g} passes"
    rate = f"{found.flops_per_second / 1e12:g} TFLOP/s ({assumed})"
    screen.say(f"{work}; at {rate} an update of {found.tokens:,} tokens takes {screen.duration(found.seconds)}")
    screen.say(f"executor: {found.executor} ({found.advice})")
