"""The configured strategies -> the plugins of the training loop."""

from collections.abc import Callable, Sequence
from typing import Any

from strategies import catalog
from strategies.agem import AveragedGem
from strategies.augment import EmbeddingNoise
from strategies.avalanche_plugins import avalanche_plugin
from strategies.derpp import DarkReplay
from strategies.distill import Distillation
from strategies.ema import SlowAverage
from strategies.ewc import ElasticWeightConsolidation
from strategies.failure import Failure
from strategies.freeze import Freezing
from strategies.gem import GradientEpisodicMemory
from strategies.kronecker import KroneckerConsolidation
from strategies.learner import Learner
from strategies.mas import MemoryAwareSynapses
from strategies.olora import OrthogonalSlices
from strategies.replay import Rehearsal
from strategies.rewrite import Rewriting
from strategies.si import SynapticIntelligence

IN_ORDER: dict[type, Callable[[Any], Learner]] = {
    catalog.Replay: Rehearsal,
    catalog.Rewrite: Rewriting,
    catalog.SynapticIntelligence: SynapticIntelligence,  # first: it reads the loss's own gradient
    catalog.Augment: EmbeddingNoise,
    catalog.Distill: Distillation,
    catalog.DerPlusPlus: DarkReplay,
    catalog.Ewc: ElasticWeightConsolidation,
    catalog.MemoryAwareSynapses: MemoryAwareSynapses,
    catalog.Kronecker: KroneckerConsolidation,
    # projections come last: what is added to the gradient after them could break the constraints that they met
    catalog.Gem: GradientEpisodicMemory,
    catalog.AGem: AveragedGem,
    # and what must not move at all comes after everything that pushes
    catalog.OLora: OrthogonalSlices,
    catalog.Freeze: Freezing,
    catalog.SlowAverage: SlowAverage,
    catalog.Avalanche: avalanche_plugin,
}


def build(strategies: Sequence[catalog.Strategy]) -> list[Learner]:
    """One plugin per strategy, in the order in which they must act on a gradient.

    Raises `Failure` for an unknown strategy and for one that is given twice (they would share their state).
    """
    for place, strategy in enumerate(strategies):
        if type(strategy) not in IN_ORDER:
            known = ", ".join(catalog.BY_NAME)
            raise Failure("bad_strategy", f"no plugin for the strategy {type(strategy).__name__}; known: {known}")
        if catalog.key_of(strategy) in {catalog.key_of(other) for other in strategies[:place]}:
            name = type(strategy).__struct_config__.tag
            reason = f"the strategy {name!r} is given twice; give it once, with the parameters you want"
            raise Failure("bad_strategy", reason)
    order = list(IN_ORDER)
    return [IN_ORDER[type(strategy)](strategy) for strategy in sorted(strategies, key=lambda it: order.index(type(it)))]
