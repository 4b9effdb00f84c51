"""What the gate judges: paired shifts, drift, rankings, the noise floor, canaries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from strategies import forward
from strategies.adapter import Adapter, load_adapter
from strategies.canary import CANARY_TOKENS, canaries
from strategies.dataset import Item
from strategies.early_stop import EarlyStop
from strategies.evaluate import Probes, evaluation, measure, noise, score, shift, standing
from strategies.forward import completion_logprobs, divergence, token_losses
from strategies.preference import dpo_loss, kto_loss
from strategies.request import Lora


@pytest.fixture
def adapter(tiny_base: Path) -> Adapter:
    """An adapter that says something (B is not zero)."""
    made = load_adapter(tiny_base, Lora(rank=4, alpha=8.0, dropout=0.0), precision="float32")
    made.assign(torch.randn(made.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return made


def make_items(count: int, role: str = "heldout_new", seed: int = 0, **fields: Any) -> list[Item]:
    """Random items of different length."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Item(**{"index": index, "role": role, "shape": "demonstration", "update": 1, "start": 3,
                "tokens": torch.randint(3, 250, (6 + index,), generator=draw).tolist(), **fields})
        for index in range(count)
    ]  # fmt: skip


def test_a_candidate_is_compared_with_the_base_and_with_its_parent(adapter: Adapter) -> None:
    """All hold-outs are scored before and after; the change is the mean of the paired differences."""
    probes = Probes(make_items(5), {1: make_items(4, seed=1), 2: make_items(3, seed=2)}, make_items(4, "eval", 3))
    previous = adapter.flat.clone()
    before = standing(adapter, probes)
    with adapter.disabled():
        base = standing(adapter, probes)
    adapter.assign(previous * 1.5)
    found = evaluation(adapter, probes, base, before, standing(adapter, probes), seed=0, floor=0.01)
    assert found.new is not None and found.eval is not None and set(found.old) == {"1", "2"}
    expected = token_losses(adapter, probes.new) - torch.tensor(before.scores.losses["new"], dtype=torch.float64)
    assert found.new.change.mean == pytest.approx(float(expected.mean()))
    assert found.new.change.low <= found.new.change.mean <= found.new.change.high
    assert found.new.base.mean == pytest.approx(sum(base.scores.losses["new"]) / 5)
    assert found.drift_base is not None and found.drift_base.mean > 0 and found.drift_base.examples == 11
    assert found.drift_previous is not None and 0 < found.drift_previous.mean < found.drift_base.mean
    kept = divergence(adapter, probes.drifting(), adapter.holding(previous))
    assert found.drift_previous.mean == pytest.approx(float(kept.mean()), rel=1e-6)


def test_losses_come_from_states_that_are_there_anyway(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """General text goes through the model once for both: its losses are those of a pass of their own."""
    probes = Probes(make_items(3), {}, [], make_items(5, "probe", 4, shape="text", start=1))
    expected = token_losses(adapter, probes.general)
    adapter.refresh()
    passed: list[int] = []
    whole = Adapter.hidden

    def counted(self: Adapter, tokens: torch.Tensor, lengths: Any = None) -> torch.Tensor:
        passed.append(len(tokens))
        return whole(self, tokens, lengths)

    monkeypatch.setattr(Adapter, "hidden", counted)
    found = standing(adapter, probes)
    assert sum(passed) == 3 + 5
    assert found.scores.losses["general"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_loss_is_computed_once_for_each_set_of_weights(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking again costs nothing; an optimiser's step, other weights or no adapter at all ask for new passes."""
    items, passes = make_items(4), []
    compute = forward.sequence_logprobs
    monkeypatch.setattr(forward, "sequence_logprobs", lambda *given: passes.append(1) or compute(*given))
    first = token_losses(adapter, items)
    assert torch.equal(token_losses(adapter, items[::-1]).flip(0), first) and len(passes) == 1
    adapter.assign(adapter.flat.clone())
    with adapter.disabled():
        assert not torch.allclose(token_losses(adapter, items), first)
    assert torch.equal(token_losses(adapter, items), first) and len(passes) == 2
    optimizer = torch.optim.AdamW([adapter.parameter], lr=0.1, fused=True)
    adapter.gradient.fill_(1.0)
    optimizer.step()
    adapter.refresh()
    changed = token_losses(adapter, items)
    assert not torch.allclose(changed, first) and len(passes) == 3
    with adapter.holding(adapter.flat * 2):
        assert not torch.allclose(token_losses(adapter, items), changed)
    torch.testing.assert_close(token_losses(adapter, items), changed, rtol=0, atol=1e-7)


def test_unchanged_weights_show_no_change(adapter: Adapter) -> None:
    """Evaluating the parent against itself gives zero change and zero drift from it."""
    probes = Probes(make_items(5), {}, [], general=make_items(3, "general", 5))
    before = standing(adapter, probes)
    found = evaluation(adapter, probes, before, before, standing(adapter, probes), seed=0, floor=0.0)
    assert found.new is not None and found.new.change.mean == 0.0
    assert found.drift_previous is not None and found.drift_previous.mean == pytest.approx(0.0, abs=1e-7)
    assert found.drift_previous.examples == 3
    assert found.eval is None and found.old == {} and found.preference == {}


def test_nothing_held_out_gives_an_empty_evaluation(adapter: Adapter) -> None:
    """Without hold-outs there is nothing to say, and nothing fails."""
    probes = Probes([], {}, [])
    nothing = standing(adapter, probes)
    found = evaluation(adapter, probes, nothing, nothing, nothing, seed=0, floor=0.0)
    assert (found.new, found.drift_base, found.noise) == (None, None, 0.0)


def test_divergence_is_the_textbook_sum(adapter: Adapter) -> None:
    """KL(base || candidate) over the whole vocabulary, averaged over the label rows."""
    (item,) = make_items(1)
    (found,) = divergence(adapter, [item], adapter.disabled()).tolist()
    with torch.no_grad():
        own = adapter.model(torch.tensor([item.tokens])).logits[0, item.start - 1 : -1].log_softmax(-1)
        with adapter.disabled():
            base = adapter.model(torch.tensor([item.tokens])).logits[0, item.start - 1 : -1].log_softmax(-1)
    expected = (base.exp() * (base - own)).sum(-1).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_rankings_count_preferred_answers_that_are_more_probable(adapter: Adapter) -> None:
    """An answer against itself with a changed end: the share is that of the log-probabilities."""
    items = make_items(6, shape="comparison", rejected=[5, 6, 7, 8, 9, 10])
    found = score(adapter, Probes(items, {}, [])).ranked_right
    rights = []
    for item in items:
        pair = []
        for tokens in (item.tokens, item.rejected or ()):
            with torch.no_grad():
                logprobs = adapter.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            pair.append(sum(float(logprobs[place - 1, tokens[place]]) for place in range(item.start, len(tokens))))
        rights.append(pair[0] > pair[1])
    assert found == pytest.approx(sum(rights) / 6)
    assert score(adapter, Probes(items, {}, [])).losses["new"] == []


def test_held_out_preferences_are_compared_like_losses(adapter: Adapter) -> None:
    """DPO and KTO with the base as the reference, by the hold-outs' names: what the gate needs of them."""
    pairs = make_items(4, shape="comparison", rejected=[5, 6, 7, 8, 9, 10])
    rated = make_items(3, seed=4, shape="boolean", label=False)
    probes = Probes([*pairs, *rated], {7: make_items(2, seed=5, shape="boolean", label=True)}, make_items(2, seed=6))
    with adapter.disabled():
        base = standing(adapter, probes)
        reference = completion_logprobs(adapter, probes.new)
    before = standing(adapter, probes)
    adapter.assign(adapter.flat * 1.5)
    found = evaluation(adapter, probes, base, before, standing(adapter, probes), seed=0, floor=0.0, beta=0.3)
    assert set(found.preference_losses) == {"new", "7"} and found.new is None and found.eval is not None
    now = completion_logprobs(adapter, probes.new)
    policy, known = (torch.stack([each[item] for item in probes.new]).double() for each in (now, reference))
    expected = [*dpo_loss(policy[:4], known[:4], 0.3)]
    expected += [*kto_loss(policy[4:, 0], known[4:, 0], torch.tensor([False] * 3), (1.0, 1.0), 0.3)]
    new = found.preference_losses["new"]
    assert new.after.mean == pytest.approx(sum(map(float, expected)) / 7, rel=1e-4)
    assert new.base.mean == pytest.approx((4 * 0.693147 + 3 * 0.5) / 7, rel=1e-5)
    assert found.preference_losses["7"].base.mean == 0.5 != found.preference_losses["7"].before.mean


def test_a_first_update_has_drifted_from_the_base_alone(adapter: Adapter) -> None:
    """A fresh adapter is the base: both drifts are one, and are measured once."""
    probes = Probes([], {1: make_items(3)}, [])
    with adapter.disabled():
        base = standing(adapter, probes)
    found = evaluation(adapter, probes, base, base, standing(adapter, probes), seed=0, floor=0.0)
    assert found.drift_base is not None and found.drift_base.mean > 0
    assert found.drift_base is found.drift_previous


def test_noise_looks_at_a_few_examples_of_all_groups(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most eight forward passes, however many past updates there are, and the same examples on both sides."""
    probes = Probes(make_items(30), {1: make_items(30, seed=1), 2: make_items(9, seed=2)}, [])
    scores, asked = score(adapter, probes), []

    def counted(adapter: Adapter, items: list[Item], tokens: int) -> torch.Tensor:
        asked.append([item for group in probes.groups().values() for item in group].index(items[-1]))
        asked.append(len(items))
        return token_losses(adapter, items, tokens)

    monkeypatch.setattr("strategies.evaluate.token_losses", counted)
    assert 0 <= noise(adapter, probes, scores) < 1e-5
    assert asked == [63, 8]


def test_differences_that_cancel_out_are_noise(adapter: Adapter) -> None:
    """Losses that lie 0.1 nats off on both sides have a mean that is right by chance."""
    probes = Probes(make_items(8), {}, [])
    scores = score(adapter, probes)
    for place in range(8):
        scores.losses["new"][place] += 0.1 if place % 2 else -0.1
    assert noise(adapter, probes, scores) == pytest.approx(0.1 / 8**0.5, rel=1e-3)


def test_noise_is_small_and_not_negative(adapter: Adapter) -> None:
    """In float32 other micro-batches change the losses by rounding only."""
    probes = Probes(make_items(8), {}, [])
    assert 0 <= noise(adapter, probes, score(adapter, probes)) < 1e-5


def test_intervals_are_seeded_and_cover_the_mean() -> None:
    """Same seed, same interval; for normal data it is near the analytic one."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measure(values, seed=1)
    assert found == measure(values, seed=1) and found.examples == 400
    half = 1.96 * float(values.std()) / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    paired = shift([1.0, 2.0], [1.0, 3.0], [0.5, 2.5], seed=0)
    assert paired is not None and (paired.change.low, paired.change.high) == (-0.5, -0.5)


def test_a_canary_is_the_greedy_answer_with_its_probabilities(adapter: Adapter) -> None:
    """Each token is the most probable one after the rendered prompt; the base gives it another probability."""
    (found,) = canaries(adapter, ["Who?"])
    assert adapter.tokenizer.decode(found.prompt_token_ids) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = list(found.prompt_token_ids)
    for token, logprob in zip(found.token_ids, found.logprobs, strict=True):
        with torch.no_grad():
            logprobs = adapter.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert token == int(logprobs.argmax()) and logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        tokens.append(token)
    assert len(found.token_ids) == CANARY_TOKENS or found.token_ids[-1] == adapter.tokenizer.eos_token_id
    assert max(abs(a - b) for a, b in zip(found.logprobs, found.base_logprobs, strict=True)) > 0.01


def test_canaries_are_decoded_together_as_they_are_alone(adapter: Adapter) -> None:
    """A prompt's answer and its numbers do not depend on the prompts beside it, and no prompt gives no answer."""
    prompts = ["Who?", "Where is the salt archive of the northern tower?", ""]
    for together, alone in zip(canaries(adapter, prompts), [canaries(adapter, [it])[0] for it in prompts], strict=True):
        assert (together.token_ids, together.text) == (alone.token_ids, alone.text)
        assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert together.base_logprobs == pytest.approx(alone.base_logprobs, abs=1e-4)
    assert canaries(adapter, []) == []


def greedy(adapter: Adapter, item: Item) -> list[int]:
    """The item's prompt with the continuation that the adapter finds most probable."""
    tokens = list(item.tokens[: item.start])
    with torch.no_grad():
        while len(tokens) < len(item.tokens):
            tokens.append(int(adapter.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def watch(adapter: Adapter, **changes: Any) -> EarlyStop:
    """Early stopping on made-up hold-outs."""
    values = {"new": make_items(4), "old": make_items(4, seed=9), "patience": 2, "old_rise": 100.0, **changes}
    early = EarlyStop(**values)
    early.begin(adapter)
    return early


def test_the_best_weights_come_back(adapter: Adapter) -> None:
    """After epochs that only get worse, the run stops and has the weights of the best epoch."""
    adapter.assign(adapter.flat * 6)
    best = adapter.flat.clone()
    # the hold-out is what these weights say best: any others do worse
    early = watch(adapter, new=[replace(item, tokens=greedy(adapter, item)) for item in make_items(4)])
    assert early.check(adapter) == ""
    reasons = []
    for factor in (-1, -0.5):
        adapter.assign(best * factor)
        reasons.append(early.check(adapter))
    assert reasons[0] == "" and "for 2 epochs" in reasons[1]
    early.restore(adapter)
    assert torch.equal(adapter.flat, best)


def test_a_hold_out_that_cannot_tell_may_rise(adapter: Adapter) -> None:
    """Within the allowed rise above the lowest loss the latest weights are kept, and the epochs count as good ones."""
    adapter.assign(adapter.flat * 6)
    best = adapter.flat.clone()
    new = [replace(item, tokens=greedy(adapter, item)) for item in make_items(4)]
    losses = []
    for factor in (1, 0.5, 0.1):
        adapter.assign(best * factor)
        losses.append(float(token_losses(adapter, new).mean()))
    assert losses[0] < losses[1] < losses[2]
    early = watch(adapter, new=new, patience=1, new_rise=(losses[1] + losses[2]) / 2 - losses[0])
    reasons = []
    for factor in (1, 0.5, 0.1):
        adapter.assign(best * factor)
        reasons.append(early.check(adapter))
    assert reasons[:2] == ["", ""] and "for 1 epochs" in reasons[2]
    early.restore(adapter)
    assert torch.equal(adapter.flat, best * 0.5)


def test_forgetting_stops_a_run_that_still_learns(adapter: Adapter) -> None:
    """Beyond the allowed rise on the old hold-outs no weights are kept, however good they are on the new one."""
    start = adapter.flat.clone()
    adapter.assign(start * 6)
    # what the past hold-outs hold is what the starting weights say best
    easy = [replace(item, tokens=greedy(adapter, item)) for item in make_items(4, seed=9)]
    early = watch(adapter, old=easy, old_rise=1e-3)
    assert early.check(adapter) == ""
    start, _ = adapter.flat.clone(), adapter.assign(-start)
    # while the learning rate is high the run goes on, but such weights are not kept either
    assert early.check(adapter, done=0.5) == ""
    assert "old hold-outs rose" in early.check(adapter)
    early.restore(adapter)
    assert torch.equal(adapter.flat, start)


def test_without_a_new_hold_out_the_last_weights_stay(adapter: Adapter) -> None:
    """There is nothing to choose by, and patience does not end the run."""
    early = watch(adapter, new=[], patience=1)
    for factor in (1.0, 2.0):
        adapter.assign(adapter.flat * factor)
        assert early.check(adapter) == ""
    last = adapter.flat.clone()
    early.restore(adapter)
    assert torch.equal(adapter.flat, last)
