"""General text that the base model writes itself, for models without a directory of it."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from test_train import FACTS, demonstration, make_run

from buffers.experience import Role
from strategies import general
from strategies.adapter import Adapter, load_adapter
from strategies.base_hash import base_sha256
from strategies.catalog import AGem, Distill, Ewc, Replay, Strategy
from strategies.dataset import Item
from strategies.general import TOKENS, add_general, kept_or_written, sample, write_general
from strategies.pulse import Pulse
from strategies.request import Lora, RunReport, RunRequest, Training
from strategies.train import attempt

Items = dict[Role, list[Item]]


@pytest.fixture(scope="module")
def adapter(tiny_base: Path) -> Adapter:
    """A random model whose adapter says something else than its base."""
    made = load_adapter(tiny_base, Lora(rank=4, alpha=8.0))
    made.assign(made.flat + 0.1)
    return made


def request(base: Path, cache: Path | None, *strategies: Strategy, update: int = 1) -> RunRequest:
    return RunRequest(
        run_id="npc-1", model="npc", update_number=update, base_path=base, experience_sha256="", lora=Lora(),
        training=Training(), strategies=list(strategies), general_cache=cache,
    )  # fmt: skip


def items_of(adapter: Adapter, asked: RunRequest, new: int = 9) -> Items:
    """What a run of `new` examples gets."""
    items: Items = defaultdict(list)
    items["new"] = [
        Item(index=place, role="new", shape="text", update=1, tokens=[1, 5], start=1) for place in range(new)
    ]
    add_general(items, asked, adapter, on_progress=lambda: None)
    return items


def texts(items: list[Item]) -> set[tuple[int, ...]]:
    return {tuple(item.tokens) for item in items}


def never(*_: object) -> None:
    raise AssertionError("this must not be asked for")


def test_the_base_model_writes_the_same_whatever_the_adapter_says(tiny_base: Path, adapter: Adapter) -> None:
    """Its own words, each once: neither a trained adapter nor the state of the random generator is heard in them."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    written = write_general(adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(written) == len(set(written)) > len(general.QUESTIONS)
    assert {example.shape for example in written} == {"text", "demonstration"}
    assert write_general(load_adapter(tiny_base, Lora(rank=8), seed=3)) == written


def test_samples_follow_the_models_distribution(adapter: Adapter) -> None:
    """Their first tokens beside padding against the probabilities: chi-squared stays near its mean."""
    starts = [[1, 40, 41], [1, 50, 51, 52, 53]] * 2000
    drawn = torch.tensor([(row or [2])[0] for row in sample(adapter, starts, seed=1, tokens=1)[::2]])
    with adapter.disabled():
        wanted = adapter.head.logits(adapter.hidden(torch.tensor([[1, 40, 41]]))[-1:]).softmax(-1)[0].double()
    counts = torch.bincount(drawn, minlength=len(wanted)).double()
    rare = wanted * 2000 < 5
    found = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = 2000 * torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    statistic = float(((found - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    freedom = len(found) - 1
    assert statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 5


def test_what_was_written_once_is_kept_by_the_bases_hash(
    tiny_base: Path, tmp_path: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run reads it, and leaves no other file behind than the cache."""
    asked = request(tiny_base, tmp_path / "cache")
    written = kept_or_written(asked.base_path, asked.general_cache, adapter, lambda: None)
    assert (tmp_path / "cache" / f"{base_sha256(tiny_base)}.jsonl").read_bytes().count(b"\n") == len(written)
    monkeypatch.setattr(general, "write_general", never)
    assert kept_or_written(asked.base_path, asked.general_cache, adapter, never) == written
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".tmp")]


def test_a_damaged_cache_is_written_anew(tiny_base: Path, tmp_path: Path, adapter: Adapter) -> None:
    """A cache may be lost at any time."""
    asked = request(tiny_base, tmp_path)
    written = kept_or_written(asked.base_path, asked.general_cache, adapter, lambda: None)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    assert kept_or_written(asked.base_path, asked.general_cache, adapter, lambda: None) == written


def test_drift_is_measured_on_what_is_never_rehearsed(tiny_base: Path, tmp_path: Path, adapter: Adapter) -> None:
    """One text in four, and no answer, is a probe, always the same; the others are drawn as the strategy asks."""
    plenty = Replay(general_ratio=0.9)
    first = items_of(adapter, request(tiny_base, tmp_path, plenty))
    second = items_of(adapter, request(tiny_base, tmp_path, Replay(general_ratio=0.5), update=2))
    assert 8 <= len(first["probe"]) <= 16
    assert len(second["general"]) == 9 * Training().epochs
    assert texts(first["probe"]) == texts(second["probe"])
    assert {item.shape for item in first["probe"]} == {"text"}
    assert {item.shape for item in first["general"]} == {"text", "demonstration"}
    assert not texts(first["probe"]) & texts(first["general"])
    assert [item.index for item in second["general"]] == list(range(9, 9 + 9 * Training().epochs))
    assert not items_of(adapter, request(tiny_base, tmp_path, Replay(general_ratio=0.0)))["general"]


@pytest.mark.parametrize("strategies", [(), (Ewc(),), (AGem(),)])
def test_nothing_is_rehearsed_that_no_strategy_asks_for(
    tiny_base: Path, tmp_path: Path, adapter: Adapter, strategies: tuple[Strategy, ...]
) -> None:
    """Without `replay` the model learns what is new alone, and the drift is measured all the same."""
    items = items_of(adapter, request(tiny_base, tmp_path, *strategies))
    assert not items["general"] and items["probe"]


def test_a_sample_that_was_cut_off_does_not_teach_to_stop(tiny_base: Path, tmp_path: Path, adapter: Adapter) -> None:
    """Its end of text is not among the labels; no item has more than the tokens that were drawn."""
    items = items_of(adapter, request(tiny_base, tmp_path, Replay(general_ratio=0.9)))
    cut = [item for item in items["general"] if item.label_tokens == TOKENS]
    assert cut
    assert all(item.label_tokens <= TOKENS for item in items["general"])
    assert all(item.tokens[-1] != adapter.tokenizer.eos_token_id for item in cut)


def test_text_that_people_gave_is_enough(
    tiny_base: Path, tmp_path: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With general text in the experience, or without a place to keep it, the base model is not asked."""
    monkeypatch.setattr(general, "write_general", never)
    assert not items_of(adapter, request(tiny_base, None))["probe"]
    given: Items = defaultdict(list)
    given["probe"] = [Item(index=0, role="probe", shape="text", update=0, tokens=[1, 5], start=1)]
    add_general(given, request(tiny_base, tmp_path, Replay(general_ratio=0.5)), adapter, never)
    assert {role: len(rows) for role, rows in given.items() if rows} == {"probe": 1}


def test_what_a_small_directory_lacks_is_written(
    tiny_base: Path, tmp_path: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch can then show other texts; a directory that is large enough for one epoch is all."""
    asked = request(tiny_base, tmp_path, Replay(general_ratio=0.5))

    def given(count: int) -> Items:
        items: Items = defaultdict(list)
        items["new"] = [Item(index=0, role="new", shape="text", update=1, tokens=[1, 5], start=1)] * 4
        items["general"] = [Item(index=9, role="general", shape="text", update=0, tokens=[1, 7], start=1)] * count
        return items

    lacking = given(3)
    add_general(lacking, asked, adapter, lambda: None)
    assert len(lacking["general"]) == 4 * Training().epochs and not lacking["probe"]
    monkeypatch.setattr(general, "kept_or_written", never)
    enough = given(4)
    add_general(enough, asked, adapter, never)
    assert len(enough["general"]) == 4


def test_a_first_update_without_any_general_text_reports_its_drift(tiny_base: Path, tmp_path: Path) -> None:
    """The gate's check of the drift never falls away; distillation on general text has something to hold on to."""
    rows = [demonstration(*fact) for fact in FACTS[:16]]
    strategies = [Replay(general_ratio=0.2), Distill(on="general")]
    directory = make_run(
        tmp_path / "1", tiny_base, rows, strategies=strategies, general_cache=tmp_path / "cache", training={"epochs": 1}
    )
    report: RunReport = attempt(directory, Pulse(directory))
    assert report.status == "trained", report.reason
    assert (report.examples["new"], report.examples["general"]) == (16, 4)
    assert report.evaluation is not None and report.evaluation.drift_base is not None
    assert report.evaluation.drift_base.mean > 0
    assert report.evaluation.drift_base.examples == report.examples["probe"] >= 8
