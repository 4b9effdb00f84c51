"""Memory and FLOPs of an update: computed figures against counted and measured ones, and what is proposed."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from operator_kit import make_config
from test_train import demonstration, make_run
from torch.utils.flop_counter import FlopCounterMode

from buffers.experience import Row
from daemon import cli, plan
from daemon.config import Model, Schedule
from daemon.plan import CannotPlan, Load, Shape
from strategies.adapter import load_adapter
from strategies.catalog import AGem, Distill, Ewc, Gem, Replay
from strategies.dataset import micro_batches, tokenise
from strategies.forward import label_states
from strategies.request import Lora, Training, read_report
from strategies.token_loss import token_loss

ROOT = Path(__file__).resolve().parent.parent
WORDS = " ".join(f"word{number}" for number in range(120))
DIRECTOR = Shape(
    hidden=4096, layers=32, queries=4096, keys=1024, heads=32, inner=14336, vocabulary=128256, tied=False
)  # fmt: skip


def model_of(base: Path, rank: int, precision: str, **fields: object) -> Model:
    """Four examples per step, two of them per forward pass, each cut to 512 tokens."""
    training = Training(batch_examples=4, micro_batch_tokens=1024, sequence_tokens=512, precision=precision)  # type: ignore[arg-type]
    return Model(base_path=base, engine="e", lora=Lora(rank=rank, alpha=2.0 * rank), training=training, **fields)  # type: ignore[arg-type]


def rows() -> list[Row]:
    """One step's worth of long examples, and a short hold-out."""
    return [demonstration(f"Say {number}:", WORDS) for number in range(4)] + [
        demonstration("And?", "No.", role="heldout_new")
    ]


def counted_flops(base: Path, rank: int, *, recomputes: bool = False) -> tuple[float, int]:
    """FLOPs per token of one forward and backward pass, as torch counts its products; tokens of each sequence."""
    adapter = load_adapter(base, Lora(rank=rank, alpha=2.0 * rank, dropout=0.0), precision="float32", device="cpu")
    adapter.state.recomputes = recomputes
    items = [tokenise(row, place, adapter.tokenizer, 512) for place, row in enumerate(rows()[:2])]
    (micro,) = micro_batches(items, 1024)
    with FlopCounterMode(display=False) as counter:
        states = label_states(adapter, micro)
        token_loss(states, adapter.head, torch.zeros(len(states), dtype=torch.int64), 1.0)[0].backward()
    tokens = sum(len(item.tokens) for item in items)
    return counter.get_total_flops() / tokens, tokens // len(items)


def measured_and_computed_bytes(directory: Path, base: Path, rank: int, precision: str) -> tuple[int, int]:
    """Peak memory of a real training child, and what the plan says."""
    training = {"epochs": 1, "batch_examples": 4, "micro_batch_tokens": 1024, "sequence_tokens": 512}
    run = make_run(
        directory / "run", base, rows(), lora=Lora(rank=rank, alpha=2.0 * rank),
        training={**training, "precision": precision, "learning_rate": 1e-4},
    )  # fmt: skip
    # by a shell: Linux counts what a process was before exec into its peak, and this one has held models
    command = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-m", "strategies.train", str(run)]
    subprocess.run(command, cwd=ROOT, check=True)
    report = read_report(run)
    assert report is not None
    return report.peak_memory_bytes, plan.plan("npc", model_of(base, rank, precision)).memory_total


@pytest.mark.parametrize("recomputes", [False, True])
def test_flops_of_a_tiny_model_are_those_that_torch_counts(tiny_base: Path, recomputes: bool) -> None:
    """Within 15 %: the count has the label rows only, and the plan every token's logits."""
    counted, length = counted_flops(tiny_base, 4, recomputes=recomputes)
    load = plan.load_of(model_of(tiny_base, 4, "float32"), length, is_cuda=False)
    load = msgspec.structs.replace(load, recompute_layers=recomputes)
    computed = plan.flops_per_token(plan.read_shape(tiny_base), load)
    assert computed == pytest.approx(counted, rel=0.15)


def test_memory_of_a_tiny_model_is_as_planned(tiny_base: Path, tmp_path: Path) -> None:
    """Mostly the libraries': within a factor of 1.5."""
    measured, computed = measured_and_computed_bytes(tmp_path, tiny_base, 4, "float32")
    assert 1 / 1.5 < measured / computed < 1.5


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_takes_what_was_planned(smollm2: Path, tmp_path: Path) -> None:
    """FLOPs within 10 %, peak memory within a factor of 1.4."""
    counted, length = counted_flops(smollm2, 16)
    load = plan.load_of(model_of(smollm2, 16, "bfloat16"), length, is_cuda=False)
    assert plan.flops_per_token(plan.read_shape(smollm2), load) == pytest.approx(counted, rel=0.1)
    measured, computed = measured_and_computed_bytes(tmp_path, smollm2, 16, "bfloat16")
    assert 1 / 1.4 < measured / computed < 1.4


def test_parameters_are_counted_as_the_model_has_them(tiny_base: Path) -> None:
    """Base and adapter, to the last one."""
    adapter = load_adapter(tiny_base, Lora(rank=4, alpha=8.0), precision="float32", device="cpu")
    shape = plan.read_shape(tiny_base)
    own = sum(weight.numel() for name, weight in adapter.model.named_parameters() if "lora_" not in name)
    assert shape.parameters == own
    assert shape.adapter_parameters(4, ["all-linear"]) == adapter.flat.numel()
    assert shape.adapter_parameters(4, ["q_proj", "v_proj"]) < adapter.flat.numel()


def test_the_8b_case_of_the_page() -> None:
    """Llama-3.1-8B: the known parameter count, 41.9 M in the adapter, and the figures that docs/scale.md prints."""
    load = Load(
        rank=16, targets=["all-linear"], bytes_per_weight=2, micro_batch_tokens=8192, sequence_tokens=1024,
        is_cuda=True,
    )  # fmt: skip
    assert DIRECTOR.parameters == 8_030_261_248
    assert DIRECTOR.adapter_parameters(16, ["all-linear"]) == 41_943_040
    memory, flops = plan.memory_of(DIRECTOR, load), plan.flops_per_token(DIRECTOR, load)
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    for name, held in {**msgspec.structs.asdict(memory), "total": memory.total}.items():
        assert f"| {name} | {held / plan.GIB:.2f} |" in page
    assert f"{flops / 1e9:.1f} GFLOP per token" in page


def test_recomputed_layers_are_planned() -> None:
    """Of the 8B model: a sixth of the activations, for half as much work again at most."""
    load = Load(
        rank=16, targets=["all-linear"], bytes_per_weight=2, micro_batch_tokens=8192, sequence_tokens=1024,
        is_cuda=True,
    )  # fmt: skip
    less = msgspec.structs.replace(load, recompute_layers=True)
    assert plan.memory_of(DIRECTOR, less).activations < plan.memory_of(DIRECTOR, load).activations / 6
    assert 1.3 < plan.flops_per_token(DIRECTOR, less) / plan.flops_per_token(DIRECTOR, load) < 1.5


def test_strategies_cost_state_and_passes() -> None:
    """EWC two vectors; GEM one gradient per constraint and passes for its memories; a teacher half a pass."""
    base = Path("base")
    plain = plan.load_of(model_of(base, 4, "auto"), None, is_cuda=False)
    assert (plain.state_vectors, plain.passes, plain.bytes_per_weight) == (0.0, 1.0, 2)
    loaded = plan.load_of(
        model_of(base, 4, "auto", strategy=[Ewc(), Gem(constraints=4, examples=16)]), 64, is_cuda=False
    )
    assert (loaded.state_vectors, loaded.passes) == (7.0, 17.0)
    # four examples of 64 tokens do not fill a forward pass of 1,024
    assert (loaded.sequence_tokens, loaded.micro_batch_tokens) == (64, 256)
    taught = plan.load_of(
        model_of(base, 4, "auto", strategy=[AGem(8), Distill(teacher="previous")]), None, is_cuda=False
    )
    assert (taught.state_vectors, taught.passes) == (3.0, 3.5)


def test_tokens_of_an_update_count_what_is_rehearsed() -> None:
    """Threshold over one minus the replayed share, that over one minus the general one, times epochs and length."""
    model = model_of(Path("base"), 4, "auto", strategy=[Replay(0.5, 0.2)], schedule=Schedule(threshold_examples=10))
    assert plan.tokens_of(model, 100) == 2 * 10 / 0.8 * 100 * model.training.epochs


def test_what_fits_where_is_said_with_the_keys_to_write() -> None:
    """One GPU, several with the whole base on each, the base divided, or activations that no sharding divides."""
    memory = plan.Memory(base=16 * plan.GIB, adapter=0, strategies=0, activations=4 * plan.GIB, logits=0, runtime=0)
    whole = 2 * plan.GIB
    assert plan.propose(memory, 0, None, whole)[0] == "process"
    assert plan.propose(memory, 1, 24.0, whole) == ("process", "one process on one GPU, 20.0 GiB of its memory")
    assert plan.propose(memory, 2, 24.0, whole) == (
        "torchrun", "backend = 'ddp', processes = 2: 20.0 GiB on each GPU"
    )  # fmt: skip
    assert plan.propose(memory, 2, 16.0, whole) == (
        "torchrun", "backend = 'fsdp2', processes = 2: 13.0 GiB on each GPU"
    )  # fmt: skip
    executor, advice = plan.propose(memory, 1, 10.0, whole)
    assert executor == "none" and advice.endswith("it needs 4 such GPUs")
    assert plan.propose(memory, 4, 10.0, whole)[0] == "torchrun"
    assert "lower micro_batch_tokens" in plan.propose(memory, 8, 4.0, whole)[1]


def test_the_command_prints_figures_and_json(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For people and scripts; a base that is no decoder is one sentence."""
    path = make_config(tmp_path)
    assert cli.main(["plan", "npc", "--config", str(path)]) == 1
    assert "has no key 'num_attention_heads'" in capsys.readouterr().err
    (tmp_path / "base" / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    assert cli.main(["plan", "npc", "--config", str(path)]) == 0
    assert "executor: process (one process on the CPU" in capsys.readouterr().out
    arguments = ["plan", "npc", "--config", str(path), "--gpus", "1", "--gpu-memory-gib", "80", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 26880 and found["executor"] == "process"
    assert cli.main(["plan", "npc", "--config", str(path), "--gpu-memory-gib", "80"]) == 2


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    """Its active parameters are not its parameters: no figure is better than a wrong one."""
    (tmp_path / "config.json").write_text('{"num_local_experts": 8}')
    with pytest.raises(CannotPlan, match="mixture of experts"):
        plan.read_shape(tmp_path)
    with pytest.raises(CannotPlan, match="cannot be read"):
        plan.read_shape(tmp_path / "nowhere")
