"""Base + LoRA in one flat vector: exactness, persistence, refusals."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from strategies.adapter import Adapter, load_adapter
from strategies.base_model import compute_dtype
from strategies.failure import Failure
from strategies.request import Lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # stock peft causes it
TOKENS = torch.tensor([[5, 9, 17, 30, 44, 6], [7, 8, 9, 10, 11, 12]])


def make(base: Path, *, dropout: float = 0.0, rank: int = 4) -> Adapter:
    """An adapter whose B is not zero, so that it says something."""
    adapter = load_adapter(base, Lora(rank=rank, alpha=8.0, dropout=dropout), precision="float32")
    adapter.assign(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return adapter


def logits(adapter: Adapter) -> torch.Tensor:
    """(tokens, vocabulary) under the present weights."""
    with torch.no_grad():
        return adapter.head.logits(adapter.hidden(TOKENS))


def test_the_flat_vector_is_the_models_parameters(tiny_base: Path) -> None:
    """Every LoRA parameter and gradient is a view; a change of the vector changes the answer at once."""
    adapter = make(tiny_base)
    leaves = [leaf for _, leaf in sorted(adapter.model.named_parameters()) if leaf.requires_grad]
    assert sum(leaf.numel() for leaf in leaves) == adapter.flat.numel()
    inside = range(adapter.flat.data_ptr(), adapter.flat.data_ptr() + adapter.flat.nbytes)
    assert all(leaf.data_ptr() in inside for leaf in leaves)
    before = logits(adapter)
    adapter.assign(adapter.flat * 2)
    assert not torch.allclose(before, logits(adapter))
    assert leaves[0].grad is not None
    adapter.gradient.fill_(3.0)
    assert float(leaves[-1].grad.mean()) == 3.0  # type: ignore[union-attr]


def test_a_saved_adapter_answers_the_same_in_stock_peft(tiny_base: Path, tmp_path: Path) -> None:
    """What is written loads in an unmodified peft model and gives the same logits."""
    adapter = make(tiny_base)
    adapter.save(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        found = PeftModel.from_pretrained(stock, str(tmp_path))(TOKENS).logits
    assert torch.allclose(found.flatten(0, 1), logits(adapter), atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_base) and config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")


def test_a_saved_adapter_loads_into_a_new_run(tiny_base: Path, tmp_path: Path) -> None:
    """Weights survive saving and loading bit for bit."""
    adapter = make(tiny_base)
    adapter.save(tmp_path)
    other = load_adapter(tiny_base, adapter.lora, precision="float32")
    other.load(tmp_path)
    assert torch.equal(other.flat, adapter.flat)


def test_gradients_equal_those_of_stock_peft(tiny_base: Path, tmp_path: Path) -> None:
    """The own backward pass gives what autograd gives through peft's layers; frozen weights get none."""
    adapter = make(tiny_base)
    adapter.save(tmp_path)
    adapter.hidden(TOKENS).square().mean().backward()
    stock = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, local_files_only=True)
    wrapped = PeftModel.from_pretrained(stock, str(tmp_path), is_trainable=True)
    wrapped.base_model.model.model(TOKENS).last_hidden_state.square().mean().backward()
    slopes = {name: leaf.grad for name, leaf in wrapped.named_parameters() if leaf.grad is not None}
    assert len(slopes) == len(adapter.names)
    expected = torch.cat([slopes[name].reshape(-1) for name in adapter.names])
    assert torch.allclose(adapter.gradient, expected, atol=1e-6, rtol=1e-4)
    assert all(leaf.grad is None for leaf in adapter.model.parameters() if not leaf.requires_grad)


def test_dropout_gradients_are_those_of_the_dropped_forward_pass(tiny_base: Path) -> None:
    """With the same mask, the backward pass agrees with finite differences along a direction."""
    adapter = make(tiny_base, dropout=0.3)

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        with adapter.dropping():
            return adapter.hidden(TOKENS).square().mean()

    loss().backward()
    direction = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(2))
    start, slope = adapter.flat.clone(), float(adapter.gradient @ direction)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            adapter.assign(start + sign * 1e-3 * direction)
            values.append(float(loss()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.02)


def test_dropout_acts_in_training_only(tiny_base: Path) -> None:
    """Two evaluations agree to the bit; two training passes do not."""
    adapter = make(tiny_base, dropout=0.5)
    assert torch.equal(logits(adapter), logits(adapter))
    with adapter.dropping():
        assert not torch.equal(logits(adapter), logits(adapter))
        with adapter.without_dropout():
            assert torch.equal(logits(adapter), logits(adapter))


def test_the_base_and_other_weights_answer_for_a_while(tiny_base: Path) -> None:
    """`disabled` is the plain base, `holding` other weights; afterwards everything is as before."""
    adapter = make(tiny_base)
    own = logits(adapter)
    stock = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, local_files_only=True)
    with torch.no_grad(), adapter.disabled():
        assert torch.allclose(logits(adapter), stock(TOKENS).logits.flatten(0, 1), atol=1e-5)
    with adapter.holding(torch.zeros_like(adapter.flat)), torch.no_grad():
        assert torch.allclose(logits(adapter), stock(TOKENS).logits.flatten(0, 1), atol=1e-5)
    assert torch.equal(logits(adapter), own)


def test_a_fresh_adapter_is_seeded_and_changes_nothing(tiny_base: Path) -> None:
    """B starts at zero, A is drawn from the seed."""
    first, same, other = (load_adapter(tiny_base, Lora(rank=4), precision="float32", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.flat, same.flat) and not torch.equal(first.flat, other.flat)
    with first.disabled():
        base = logits(first)
    assert torch.equal(logits(first), base)


def test_a_borrowed_gradient_is_given_back(tiny_base: Path) -> None:
    """Side computations leave the accumulated gradient as it was."""
    adapter = make(tiny_base)
    adapter.gradient.fill_(2.0)
    with adapter.own_gradient() as gradient:
        adapter.hidden(TOKENS).square().mean().backward()
        assert float(gradient.abs().max()) > 0 and float(gradient.mean()) != 2.0
    assert bool((adapter.gradient == 2.0).all())


def test_a_parent_of_another_rank_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """The failure names both sizes and what to do."""
    make(tiny_base, rank=4).save(tmp_path)
    with pytest.raises(Failure, match="keep rank and targets") as caught:
        load_adapter(tiny_base, Lora(rank=8), precision="float32").load(tmp_path)
    assert caught.value.code == "parent_mismatch"


def test_a_damaged_parent_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """A torn file is a failure with a code, not a traceback."""
    make(tiny_base).save(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(Failure) as caught:
        make(tiny_base).load(tmp_path)
    assert caught.value.code == "parent_unreadable"


def test_a_directory_without_weights_is_no_base(tiny_base: Path, tmp_path: Path) -> None:
    """Configuration without weights: unreadable, and nothing is looked up on a network."""
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    with pytest.raises(Failure) as caught:
        load_adapter(tmp_path, Lora())
    assert caught.value.code == "base_unreadable"


def test_weights_that_are_not_finite_are_seen(tiny_base: Path) -> None:
    """One NaN is enough."""
    adapter = make(tiny_base)
    assert adapter.is_finite()
    adapter.flat[7] = float("nan")
    assert not adapter.is_finite()


def test_half_precision_keeps_float32_masters(tiny_base: Path, tmp_path: Path) -> None:
    """In bfloat16 the flat vector and the file stay float32, and logits stay near those of float32."""
    adapter = make(tiny_base)
    half = load_adapter(tiny_base, adapter.lora, precision="bfloat16")
    half.assign(adapter.flat)
    assert half.flat.dtype == torch.float32 and half.head.weight.dtype == torch.bfloat16
    assert float((logits(half) - logits(adapter)).abs().max()) < 0.05
    half.save(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_precision_is_decided_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes bfloat16 where the processor multiplies it in hardware; an explicit choice stands."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert compute_dtype("auto", cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert compute_dtype("auto", cpu) == torch.bfloat16
    assert compute_dtype("float32", cpu) == torch.float32
