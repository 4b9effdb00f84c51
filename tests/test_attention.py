"""Batches without padding for attention kernels that know where a sequence ends: exact, and by their contract."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strategies import attention
from strategies.adapter import Adapter, load_adapter
from strategies.attention import attention_for, packed
from strategies.request import Lora

LENGTHS = [7, 1, 12, 12]


@pytest.fixture
def adapter(tiny_base: Path) -> Adapter:
    """One that computes by the base's own layers, as on a GPU."""
    made = load_adapter(tiny_base, Lora(rank=4, alpha=8.0, dropout=0.0), precision="float32")
    made.assign(torch.randn(made.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    made.call_layers()
    return made


def gradient_of(adapter: Adapter, packs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states at the real tokens, and the gradient of a sum over them."""
    tokens = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(2))
    real = attention.real_places(tokens.shape, LENGTHS)
    adapter.packs = packs
    with adapter.own_gradient() as gradient:
        states = adapter.hidden(tokens, LENGTHS)[real]
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        return states.detach(), gradient.clone()


def test_one_row_of_all_sequences_is_the_padded_batch(adapter: Adapter) -> None:
    """No sequence sees another one: same states, same gradients."""
    padded, packed_row = gradient_of(adapter, packs=False), gradient_of(adapter, packs=True)
    torch.testing.assert_close(packed_row[0], padded[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed_row[1], padded[1], rtol=1e-3, atol=1e-4)
    assert padded[1].norm() > 1


def test_the_kernel_is_told_the_ends_of_the_sequences() -> None:
    """int32 ends from 0 and the longest length: the contract of FlashAttention's kernel for any lengths."""
    asked: dict[str, Any] = {}

    def decoder(**given: Any) -> SimpleNamespace:
        asked.update(given)
        return SimpleNamespace(last_hidden_state=given["input_ids"][..., None].float())

    tokens = torch.arange(1, 49).view(4, 12)
    states = packed(decoder, tokens, LENGTHS)
    assert asked["cu_seq_lens_q"].tolist() == asked["cu_seq_lens_k"].tolist() == [0, 7, 8, 20, 32]
    assert asked["cu_seq_lens_q"].dtype == torch.int32
    assert asked["max_length_q"] == asked["max_length_k"] == 12
    assert asked["position_ids"].tolist() == [[*range(7), 0, *range(12), *range(12)]]
    assert states.view(4, 12)[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "expected"),
    [
        ("cuda", torch.bfloat16, True, "flash_attention_2"),
        ("cuda", torch.bfloat16, False, "sdpa"),
        ("cuda", torch.float32, True, "sdpa"),
        ("cpu", torch.bfloat16, True, "eager"),
        ("cpu", torch.float32, True, "sdpa"),
    ],
)
def test_attention_is_chosen_by_device_precision_and_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, installed: bool, expected: str
) -> None:
    """FlashAttention takes half precision on GPUs only."""
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    assert attention_for(torch.device(device), dtype) == expected
