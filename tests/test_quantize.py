"""A base in 4 bits: refused in one sentence where it cannot be, planned, and, with bitsandbytes, really trained on."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_base
from operator_kit import make_config
from test_parallel import difference, request
from test_train import facts, make_run, run

from daemon import plan
from daemon.config import ConfigError, Model, load
from strategies.adapter import load_adapter
from strategies.failure import Failure
from strategies.parallel import choice
from strategies.parallel.choice import DIVIDED, Parallel, four_bit_refusal
from strategies.quantize import prepare
from strategies.request import Lora, Training

BASE_OF_8B = plan.Shape(
    hidden=4096, layers=32, queries=4096, keys=1024, heads=32, inner=14336, vocabulary=128256, tied=False
)  # fmt: skip
needs_bitsandbytes = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs pip install 'eternad[qlora]'"),
]


@pytest.mark.parametrize("backend", DIVIDED)
def test_a_base_in_four_bits_is_not_divided(backend: choice.BackendName) -> None:
    """Said before any work, with what to take instead."""
    reason = four_bit_refusal(Parallel(executor="torchrun", backend=backend, processes=2))
    assert backend in reason and reason.endswith("take backend = 'ddp'") and "\n" not in reason


def test_the_configuration_and_the_trainer_name_the_missing_package(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the command, by the daemon that reads the file and by the child that gets such a request."""
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    says = "quantize = 'nf4' needs the package bitsandbytes, which is not installed: pip install 'eternad[qlora]'"
    path = make_config(tmp_path)
    path.write_text(path.read_text().replace("[models.npc]", '[models.npc.training]\nquantize = "nf4"\n\n[models.npc]'))
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert str(refused.value).endswith(f"[models.npc].training: {says}")
    report = run(make_run(tmp_path / "run", tiny_base, facts(2), training={"quantize": "nf4"}))
    assert (report.status, report.code, report.reason) == ("failed", "bad_quantize", says)


def test_the_plan_counts_four_bits_and_proposes_them() -> None:
    """8B: 3.4 GiB of layers and 2 GiB of the rest instead of 15; a GPU of 24 GiB is enough with them alone."""
    loaded = plan.Load(
        rank=16, targets=["all-linear"], bytes_per_weight=2, micro_batch_tokens=2048, sequence_tokens=1024,
        is_cuda=True, quantize="nf4",
    )  # fmt: skip
    rest = BASE_OF_8B.parameters - BASE_OF_8B.linear_parameters
    layer = 4096 * 14336  # the largest of them, as it is multiplied
    base = BASE_OF_8B.linear_parameters * 4.127 / 8 + 2 * rest + 2 * layer
    assert plan.memory_of(BASE_OF_8B, loaded).base == pytest.approx(base, rel=1e-3)
    page = (Path(__file__).resolve().parent.parent / "docs" / "scale.md").read_text("utf-8")
    assert f"{plan.memory_of(BASE_OF_8B, loaded).total / plan.GIB:.1f} GiB" in page


def test_a_gpu_too_small_for_the_base_is_told_of_four_bits(tmp_path: Path) -> None:
    """In the same sentence that says what is missing; where the base is in 4 bits already, sharding is not offered."""
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,'
        ' "intermediate_size": 14336, "vocab_size": 128256}'
    )
    training = Training(micro_batch_tokens=2048)
    model = Model(base_path=tmp_path, engine="e", training=training)
    found = plan.plan("npc", model, gpus=1, gpu_memory_gib=16.0)
    assert found.executor == "none" and found.advice.endswith("with quantize = 'nf4' 15.3 GiB on each GPU are enough")
    four = Model(base_path=tmp_path, engine="e", training=Training(micro_batch_tokens=2048, quantize="nf4"))
    assert plan.plan("npc", four, gpus=1, gpu_memory_gib=16.0).executor == "process"
    assert "fsdp2" not in plan.plan("npc", four, gpus=4, gpu_memory_gib=8.0).advice


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose layers have whole blocks of inputs."""
    return make_tiny_base(tmp_path_factory.mktemp("wide") / "base", hidden=64)


@pytest.fixture(scope="module")
def rounded_base(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base with every linear weight rounded to 4 bits and written out again: what the layers stand for."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("rounded") / "base"
    adapter = load_adapter(wide_base, Lora(dropout=0.0), precision="float32", quantize="nf4")
    whole = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
    layers = {name.replace(".base_layer", ""): layer for name, layer in adapter.model.get_base_model().named_modules()}
    for name, layer in whole.named_modules():
        if hasattr(layers[name].weight if hasattr(layers[name], "weight") else None, "quant_state"):
            weight = layers[name].weight
            layer.weight.data = dequantize_4bit(weight.data, weight.quant_state)
    whole.save_pretrained(directory)
    AutoTokenizer.from_pretrained(wide_base).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=needs_bitsandbytes) for cell in ("naive", "ewc", "gem")])
def test_training_on_four_bits_is_training_on_the_rounded_base(
    wide_base: Path, rounded_base: Path, tmp_path: Path, cell: str
) -> None:
    """The oracle: the hand-written pass over the rounded weights gives the same adapter and the same losses.

    GEM computes the layers anew in the backward pass as well, as one who counts bytes would.
    """
    settings = {"quantize": "nf4", "recompute_layers": cell == "gem"}
    four = run(request(wide_base, tmp_path / "four", cell, training=settings))
    whole = run(request(rounded_base, tmp_path / "whole", cell))
    exact = run(request(wide_base, tmp_path / "exact", cell))
    assert four.status == whole.status == exact.status == "trained", (four.reason, whole.reason, exact.reason)
    assert [loss for _, loss in four.losses] == pytest.approx([loss for _, loss in whole.losses], abs=1e-4)
    assert difference(tmp_path / "four", tmp_path / "whole") < 1e-4
    assert four.losses[-1][1] < four.losses[0][1]
    # rounding moves the losses, by little: a base in 4 bits is not the base
    assert 0 < abs(four.losses[-1][1] - exact.losses[-1][1]) < 0.1


@pytest.mark.parametrize("hidden", [pytest.param(32, marks=needs_bitsandbytes)])
def test_layers_without_whole_blocks_are_refused(tmp_path: Path, hidden: int) -> None:
    """bitsandbytes would give their weights back wrongly, and say nothing."""
    base = make_tiny_base(tmp_path / "base", hidden=hidden)
    with pytest.raises(Failure, match=r"has 32 inputs, no multiple of 64.*take quantize = 'none'"):
        load_adapter(base, Lora(), precision="float32", quantize="nf4")


def test_a_base_that_is_not_in_four_bits_may_have_any_width(tiny_base: Path) -> None:
    """The check looks at quantised layers only."""
    prepare(load_adapter(tiny_base, Lora(), precision="float32").model)
