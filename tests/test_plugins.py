"""One contract for all learning methods, on a bigram model whose runs take milliseconds."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from strategies import catalog
from strategies.failure import Failure
from strategies.plugins import build

sys.path.insert(0, str(Path(__file__).parent))
from bigram import (
    BigramLoop,
    assert_equal_states,
    experience,
    learners_with,
    load,
    one_update,
    save,
    states_of,
    updates,
)

CONFIGURED = {
    "replay": [catalog.Replay()],
    "ewc": [catalog.Ewc(strength=0.02, general=0.5)],
    "ewc separate": [catalog.Ewc(mode="separate", strength=0.02)],
    "gem": [catalog.Gem()],
    "gem, refreshed rarely": [catalog.Gem(refresh_steps=5, strength=0.05)],
    "agem": [catalog.AGem(examples=3)],
    "distill": [catalog.Distill(top=5)],
    "distill, previous, all": [catalog.Distill(teacher="previous", on="all", temperature=2.0, top=3)],
    "derpp": [catalog.DerPlusPlus(top=5, cap=20)],
    "si": [catalog.SynapticIntelligence(strength=0.02)],
    "mas": [catalog.MemoryAwareSynapses(strength=0.02)],
    "composed": [
        catalog.Gem(),
        catalog.Ewc(strength=0.02),
        catalog.Replay(),
        catalog.SynapticIntelligence(strength=0.01),
        catalog.Distill(),
        catalog.DerPlusPlus(cap=9),
    ],
}


@pytest.fixture(params=CONFIGURED)
def configured(request: pytest.FixtureRequest) -> list[catalog.Strategy]:
    """Every method alone, with several settings, and all of them together."""
    return list(CONFIGURED[request.param])


def test_same_seed_same_result(configured: list[catalog.Strategy]) -> None:
    """Three updates twice: weights, states and reports are equal bit for bit."""
    (first, first_states), (second, second_states) = updates(configured, 3), updates(configured, 3)
    assert torch.equal(first.adapter.flat, second.adapter.flat)
    assert first.reports == second.reports
    assert_equal_states(first_states, second_states)


def test_state_survives_save_and_load(configured: list[catalog.Strategy], tmp_path: Path) -> None:
    """A third update from files equals one from memory, bit for bit."""
    loop, states = updates(configured, 2)
    save(states, tmp_path)
    from_memory, _ = one_update(configured, 3, loop.adapter.flat, states)
    from_files, _ = one_update(configured, 3, loop.adapter.flat, load(tmp_path))
    assert torch.equal(from_memory.adapter.flat, from_files.adapter.flat)


def test_a_resumed_run_equals_an_uninterrupted_one(configured: list[catalog.Strategy], tmp_path: Path) -> None:
    """Stop at step 7, save, start anew with the parent's and then the checkpoint's state: nothing changes."""
    parent, states = updates(configured, 2)
    whole, whole_states = one_update(configured, 3, parent.adapter.flat, states)
    stopped, learners = BigramLoop(experience(3), 3, parent.adapter.flat), learners_with(configured, states)
    for learner in learners:
        learner.before_training_exp(stopped)
    stopped.train(learners, stop_before=7)
    save(states_of(learners), tmp_path)
    resumed, learners = BigramLoop(experience(3), 3, parent.adapter.flat), learners_with(configured, states)
    for learner in learners:
        learner.before_training_exp(resumed)
    for learner in learners:
        learner.load_state(*load(tmp_path)[learner.name])
    resumed.step = 7
    resumed.adapter.flat.copy_(stopped.adapter.flat)
    resumed.generator.set_state(stopped.generator.get_state())
    resumed.train(learners)
    assert torch.equal(resumed.adapter.flat, whole.adapter.flat)
    assert_equal_states(states_of(learners), whole_states)


def test_state_does_not_grow_with_the_number_of_updates(configured: list[catalog.Strategy]) -> None:
    """After nine updates a method keeps as many bytes as after four: no method here pays per past update."""
    sizes = [
        sum(tensor.nbytes for tensors, _ in updates(configured, count)[1].values() for tensor in tensors.values())
        for count in (4, 9)
    ]
    assert sizes[1] <= sizes[0] * 1.1


def test_frozen_parameters_and_inputs_stay_as_they_were(configured: list[catalog.Strategy]) -> None:
    """No method touches the base model, the items or the weights that the run started from."""
    before = msgspec.json.encode([[item.tokens for item in rows] for rows in experience(3).values()])
    loop, _ = updates(configured, 3)
    assert torch.equal(loop.base, loop.frozen)
    assert msgspec.json.encode([[item.tokens for item in loop.items[role]] for role in experience(3)]) == before


def test_a_first_update_without_any_past_works(configured: list[catalog.Strategy]) -> None:
    """No replay, no memory, no general text: every method lets the run learn freely."""
    new = experience(1)["new"]
    loop, free = BigramLoop({"new": new}, 1), BigramLoop({"new": new}, 1)
    learners = build(configured)
    for learner in learners:
        learner.before_training_exp(loop)
    loop.train(learners)
    free.train([])
    if not any(isinstance(strategy, catalog.Distill) and strategy.on == "all" for strategy in configured):
        assert torch.equal(loop.adapter.flat, free.adapter.flat)
    assert loop.loss(loop.adapter.flat, new) < loop.loss(loop.start, new) - 0.5


def test_a_new_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """All methods at once: the third update of another process, from files, gives the same weights and states."""
    loop, states = updates(CONFIGURED["composed"], 2)
    save(states, tmp_path)
    save_file({"theta": loop.adapter.flat}, tmp_path / "theta.weights")
    (tmp_path / "methods.txt").write_bytes(msgspec.json.encode(CONFIGURED["composed"]))
    script = (
        "import sys, msgspec; from pathlib import Path; from safetensors.torch import load_file, save_file\n"
        "from bigram import load, one_update, save; from strategies.catalog import Strategy\n"
        "here = Path(sys.argv[1]); out = here / 'after'; out.mkdir()\n"
        "theta = load_file(here / 'theta.weights')['theta']\n"
        "methods = msgspec.json.decode((here / 'methods.txt').read_bytes(), type=list[Strategy])\n"
        "loop, states = one_update(methods, 3, theta, load(here))\n"
        "save(states, out); save_file({'theta': loop.adapter.flat}, out / 'theta.weights')\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True, timeout=120)
    expected, expected_states = one_update(CONFIGURED["composed"], 3, loop.adapter.flat, states)
    assert torch.equal(load_file(tmp_path / "after" / "theta.weights")["theta"], expected.adapter.flat)
    assert_equal_states(load(tmp_path / "after"), expected_states)


def test_every_strategy_of_the_catalog_has_a_plugin() -> None:
    """A name that the configuration accepts is a name that a run can build, and reports under."""
    for name, struct in catalog.BY_NAME.items():
        (learner,) = build([struct()])
        assert learner.name == name


def test_projections_come_last() -> None:
    """What is added to a gradient after a projection could break its constraints: the order given does not matter."""
    names = [learner.name for learner in build([catalog.Gem(), catalog.Ewc(), catalog.AGem(), catalog.Replay()])]
    assert names == ["replay", "ewc", "gem", "agem"]


def test_a_strategy_given_twice_is_refused() -> None:
    """Two of a kind would overwrite each other's state."""
    with pytest.raises(Failure, match="'ewc' is given twice"):
        build([catalog.Ewc(), catalog.Gem(), catalog.Ewc(strength=2.0)])


def test_an_unknown_strategy_is_named() -> None:
    """The message says which strategies there are."""

    class Unheard(msgspec.Struct):
        """Not in the catalog."""

    with pytest.raises(Failure, match="no plugin for the strategy Unheard; known: replay, "):
        build([Unheard()])  # type: ignore[list-item]
