"""What the methods do in the loop: gradients and stored values against direct computations, and less forgetting."""

import sys
from pathlib import Path

import pytest
import torch

from strategies import catalog
from strategies.derpp import key_of
from strategies.ewc import importance
from strategies.failure import Failure
from strategies.plugins import build

sys.path.insert(0, str(Path(__file__).parent))
from bigram import BigramLoop, experience, items_of, learners_with, one_update, updates


def divergence_of(said: torch.Tensor, loop: BigramLoop, words: torch.Tensor) -> float:
    """Mean KL of what was said (log-probabilities) and what the loop's weights say now."""
    now = loop.logits(loop.adapter.flat, words).log_softmax(-1)
    return float((said.exp() * (said - now)).sum(-1).mean())


def loss_of_first(configured: list[catalog.Strategy]) -> tuple[float, float]:
    """Loss on update 1's rows and on update 2's, after two updates without any replay."""
    states, theta = {}, None
    for number in (1, 2):
        rows = {**experience(number), "replay": [], "general": []}
        loop, learners = BigramLoop(rows, number, theta), learners_with(configured, states)
        for learner in learners:
            learner.before_training_exp(loop)
        loop.train(learners)
        theta, states = loop.adapter.flat, {learner.name: learner.state() for learner in learners}
    return tuple(float(loop.loss(theta, items_of("new", number, 8))) for number in (1, 2))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "strategy",
    [
        catalog.Ewc(strength=0.02),
        catalog.Ewc(strength=0.02, mode="separate"),
        catalog.Gem(),
        catalog.AGem(),
        catalog.SynapticIntelligence(strength=0.02),
        catalog.MemoryAwareSynapses(strength=0.05),
    ],
)
def test_less_is_forgotten_and_the_new_is_still_learned(strategy: catalog.Strategy) -> None:
    """Without replay each method alone keeps the first update better than none does, and still learns the second."""
    old_naive, new_naive = loss_of_first([])
    old, new = loss_of_first([strategy])
    untrained = BigramLoop(experience(2), 2)
    assert old < old_naive - 0.02
    assert new < float(untrained.loss(untrained.start, items_of("new", 2, 8))) - 0.3
    assert new >= new_naive - 1e-6


def test_ewc_adds_its_analytic_gradient_and_reports_its_penalty() -> None:
    """After the backward pass the gradient is the loss's plus lambda F (theta - theta*), F by hand per example."""
    first, states = updates([catalog.Ewc(strength=0.7, samples=99)], 1)
    squares = torch.stack([first.gradient_of([item]) ** 2 for item in first.items["new"]]).mean(0)
    fisher = importance(squares, normalise=True)
    loop, (ewc,) = BigramLoop(experience(2), 2, first.adapter.flat), learners_with([catalog.Ewc(strength=0.7)], states)
    loop.adapter.flat += 0.1 * torch.randn(144, generator=torch.Generator().manual_seed(4))
    loop.adapter.gradient.fill_(0.25)
    ewc.after_backward(loop)
    away = loop.adapter.flat - first.adapter.flat
    torch.testing.assert_close(loop.adapter.gradient, 0.25 + 0.7 * fisher * away)
    assert loop.reports["ewc"]["penalty"] == pytest.approx(0.35 * float((fisher * away**2).sum()), rel=1e-5)


def test_ewc_protects_a_memorised_update_as_well() -> None:
    """Fisher information a million times smaller makes no difference when it is normalised, all when it is not."""
    for normalise in (True, False):
        loop = BigramLoop(experience(1), 1)
        (ewc,) = build([catalog.Ewc(normalise=normalise)])
        loop.per_example_squared_gradients = lambda _: torch.full((144,), 1e-6)
        ewc.after_training_exp(loop)
        assert loop.reports["ewc"]["fisher_mean"] == pytest.approx(1.0 if normalise else 1e-6, rel=1e-5)


def test_ewc_refuses_the_state_of_another_rank() -> None:
    """A parent with another adapter size is an error that names both sizes."""
    _, states = updates([catalog.Ewc()], 1)
    (ewc,) = learners_with(
        [catalog.Ewc()], {"ewc": ({k: v[:7] for k, v in states["ewc"][0].items()}, states["ewc"][1])}
    )
    with pytest.raises(Failure, match="7 parameters, the adapter 144"):
        ewc.after_backward(BigramLoop(experience(2), 2))


def test_ewc_is_anchored_on_the_pretraining_task_once() -> None:
    """With `general` a first update feels the anchor at the base; a later one has replaced it by what was learned."""
    free, held = (one_update([catalog.Ewc(general=weight)], 1, None, {})[0] for weight in (0.0, 0.05))
    assert float(held.adapter.flat.norm()) < float(free.adapter.flat.norm())
    assert "penalty" in held.reports["ewc"]
    assert "penalty" not in free.reports["ewc"]


def test_gem_meets_every_constraint_at_every_step() -> None:
    """After the projection no memory's loss rises to first order; the number of projections is reported."""
    first, states = updates([], 4)
    loop, (gem,) = BigramLoop(experience(5), 5, first.adapter.flat), build([catalog.Gem(constraints=4, examples=4)])
    gem.before_training_exp(loop)
    assert loop.reports["gem"]["constraints"] == 4
    seen = 0
    for seed in range(30):
        gem.before_training_iteration(loop)
        loop.adapter.gradient.copy_(torch.randn(144, generator=torch.Generator().manual_seed(seed)))
        before = loop.adapter.gradient.clone()
        gem.after_backward(loop)
        seen += int(not torch.equal(before, loop.adapter.gradient))
        for number in range(1, 5):
            reference = loop.gradient_of(loop.items["memory"][4 * (number - 1) :][:4])
            floor = -1e-5 * before.norm() * reference.norm()
            assert reference @ loop.adapter.gradient >= floor
        loop.step += 1
    assert loop.reports["gem"]["projections"] == seen > 0
    assert states == {}


def test_gem_looks_at_other_examples_each_time() -> None:
    """Two of four per past update: after some steps every one of them was in a reference gradient."""
    loop, (gem,) = BigramLoop(experience(2), 2), build([catalog.Gem(constraints=1, examples=2)])
    gem.before_training_exp(loop)
    seen: list[list[int]] = []
    gradient_of = loop.gradient_of
    loop.gradient_of = lambda items: (seen.append([item.index for item in items]), gradient_of(items))[1]
    for _ in range(20):
        gem.before_training_iteration(loop)
        loop.step += 1
    assert {len(set(each)) for each in seen} == {2}
    assert {index for each in seen for index in each} == {item.index for item in loop.items["memory"]}


def test_gem_caps_its_constraints_and_keeps_every_age() -> None:
    """Of nine past updates, four constrain: the latest, the first and two between."""
    loop, (gem,) = BigramLoop(experience(10), 10), build([catalog.Gem(constraints=4)])
    gem.before_training_exp(loop)
    assert list(gem.memory) == [1, 4, 6, 9]


def test_gem_refreshes_its_references_only_when_due() -> None:
    """With refresh_steps = 3 six steps cost two rounds of reference gradients."""
    loop, (gem,) = BigramLoop(experience(3), 3), build([catalog.Gem(refresh_steps=3)])
    calls = []
    own, loop.gradient_of = loop.gradient_of, lambda items: calls.append(loop.step) or own(items)
    gem.before_training_exp(loop)
    for step in range(6):
        loop.step = step
        gem.before_training_iteration(loop)
    assert calls == [0, 0, 3, 3]


def test_agem_draws_a_batch_of_constant_size() -> None:
    """However many past updates there are, each step draws `examples` items, and not always the same."""
    loop, (agem,) = BigramLoop(experience(9), 9), build([catalog.AGem(examples=5)])
    drawn = []
    own, loop.gradient_of = loop.gradient_of, lambda items: drawn.append(items) or own(items)
    for _ in range(8):
        agem.before_training_iteration(loop)
    assert {len(batch) for batch in drawn} == {5}
    assert len({tuple(batch) for batch in drawn}) > 1


def test_distillation_holds_the_rehearsed_rows_to_the_base() -> None:
    """The stronger the term, the smaller the KL to the base on general text after the update."""
    drifts = []
    for strength in (0.0, 1.0, 10.0):
        loop, _ = one_update([catalog.Distill(strength=strength, on="general", top=12)], 1, None, {})
        words = torch.tensor([word for item in loop.items["general"] for word in item.tokens[:-1]])
        base = loop.logits(torch.zeros(144), words).log_softmax(-1)
        drifts.append(
            float((base.exp() * (base - loop.logits(loop.adapter.flat, words).log_softmax(-1))).sum(-1).mean())
        )
    assert drifts[0] > drifts[1] > drifts[2]


def test_derpp_remembers_what_was_said_when_it_was_learned() -> None:
    """Stored answers are the model's own log-probabilities at the end of the update in which the example was new."""
    first, states = updates([catalog.DerPlusPlus(top=12)], 1)
    second, states = one_update([catalog.DerPlusPlus(top=12)], 2, first.adapter.flat, states)
    (derpp,) = learners_with([catalog.DerPlusPlus(top=12)], states)
    for loop, number in ((first, 1), (second, 2)):
        for item in items_of("replay", number, 8):
            answer = derpp.answers[key_of(item)]
            words = torch.tensor(list(item.tokens[:-1]))
            said = loop.logits(loop.adapter.flat, words).log_softmax(-1)
            torch.testing.assert_close(
                said.gather(-1, answer.tokens.long()), answer.logprobs.float(), atol=5e-3, rtol=0
            )


def test_derpp_pulls_replayed_rows_back_to_their_answers() -> None:
    """A third update with the term says on replayed rows more nearly what was said at first."""
    first, states = updates([catalog.DerPlusPlus(top=12)], 2)
    with_term, _ = one_update([catalog.DerPlusPlus(top=12, strength=5.0)], 3, first.adapter.flat, states)
    without, _ = one_update([catalog.DerPlusPlus(top=12, strength=0.0)], 3, first.adapter.flat, states)
    assert with_term.reports["derpp"]["examples"] == len(with_term.items["replay"])
    words = torch.tensor([word for item in items_of("replay", 2, 8)[:4] for word in item.tokens[:-1]])
    said = first.logits(first.adapter.flat, words).log_softmax(-1)
    assert divergence_of(said, with_term, words) < divergence_of(said, without, words)


def test_derpp_forgets_beyond_its_cap() -> None:
    """At most `cap` examples keep their answers: those with the largest weights, which the replay buffer keeps too."""
    _, states = updates([catalog.DerPlusPlus(cap=10)], 5)
    keys = set(states["derpp"][0]["keys"].tolist())
    ranked = sorted((item for number in range(1, 6) for item in items_of("new", number, 8)), key=lambda it: -it.weight)
    assert len(keys) == 10
    assert min(it.weight for it in ranked if key_of(it) in keys) >= ranked[9].weight
    assert {key_of(it) for it in ranked if it.weight > ranked[9].weight} <= keys


def test_replay_reports_the_shares_that_were_reached() -> None:
    """Shares by example and by label token: the loss is averaged over the latter."""
    loop, _ = updates([catalog.Replay(general_ratio=0.3)], 3)
    report = loop.reports["replay"]
    assert report["examples"] == report["different"] == 8
    assert report["share"] == pytest.approx(8 / (8 + 8 + 5))
    tokens = {role: sum(len(item.tokens) - 1 for item in loop.items[role]) for role in ("new", "replay", "general")}
    assert report["token_share"] == pytest.approx(tokens["replay"] / sum(tokens.values()))
    assert report["general_token_share"] == pytest.approx(tokens["general"] / sum(tokens.values()))
    fewer = updates([catalog.Replay(ratio=0.2, general_ratio=0.1)], 3)[0].reports["replay"]
    assert (fewer["examples"], fewer["different"], fewer["share"]) == (2, 8, pytest.approx(2 / (8 + 2 + 1)))
