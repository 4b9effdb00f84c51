"""What a hyper-parameter search may change: the numbers of a model's configuration, their bounds, and back again.

A parameter is named by its place: `training.learning_rate`, `lora.rank`, `ewc.strength`. A model's own values are
always inside its space (bounds give way to them), so that a search can begin at what is configured.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar

import msgspec

from strategies.catalog import BY_NAME, OLora, Strategy
from strategies.request import Lora, Training

Value = float | int
Values = Mapping[str, Value]
Table = TypeVar("Table", bound=msgspec.Struct)


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One number and where it may lie, both ends included."""

    name: str
    kind: Literal["float", "int"]
    low: float
    high: float
    log: bool = False
    """Steps are factors: for what matters by its order of magnitude."""
    grid: list[float]
    """The values of a grid search."""

    def legal(self, value: float) -> Value:
        """The nearest value that the parameter can have."""
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.kind == "int" else inside


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a search changes of a model's configuration."""

    lora: Lora
    training: Training
    strategies: list[Strategy] = []


class Bounds(msgspec.Struct, frozen=True):
    """Of a parameter, before a model's own value is known."""

    low: float
    high: float
    log: bool = False
    kind: Literal["float", "int"] = "float"


COMMON: dict[str, Bounds] = {
    "training.learning_rate": Bounds(2e-5, 2e-3, log=True),
    "training.epochs": Bounds(1, 8, kind="int"),
    "training.weight_decay": Bounds(0.0, 0.1),
    "lora.rank": Bounds(4, 64, log=True, kind="int"),
    "lora.dropout": Bounds(0.0, 0.2),
}
OF_STRATEGY: dict[str, Bounds] = {
    "replay.ratio": Bounds(0.0, 0.6),
    "ewc.strength": Bounds(1e-2, 1e3, log=True),
    "kronecker.strength": Bounds(1e-2, 1e3, log=True),
    "si.strength": Bounds(1e-2, 1e3, log=True),
    "mas.strength": Bounds(1e-2, 1e3, log=True),
    "distill.strength": Bounds(1e-2, 10.0, log=True),
    "derpp.strength": Bounds(1e-2, 10.0, log=True),
    "olora.strength": Bounds(1e-2, 10.0, log=True),
    "gem.strength": Bounds(0.0, 2.0),
    "agem.strength": Bounds(0.0, 2.0),
    "augment.noise": Bounds(0.0, 15.0),
}
"""Only those of strategies that the model has: a search tunes a method, it does not choose one."""
GRID_POINTS = 3


def space_of(settings: Settings) -> list[Parameter]:
    """The parameters that a search of this model varies, each around its own value."""
    names = {name_of(strategy) for strategy in settings.strategies}
    wanted = COMMON | {name: bounds for name, bounds in OF_STRATEGY.items() if name.split(".")[0] in names}
    if any(isinstance(strategy, OLora) for strategy in settings.strategies):
        del wanted["lora.rank"]  # its slices must divide the rank
    own = values_of(settings, list(wanted))
    return [_parameter(name, bounds, own[name]) for name, bounds in wanted.items()]


def _parameter(name: str, bounds: Bounds, own: float) -> Parameter:
    log = bounds.log and own > 0  # a strength of 0 has no order of magnitude
    low, high = min(bounds.low if log or not bounds.log else 0.0, own), max(bounds.high, own)
    whole = Parameter(name=name, kind=bounds.kind, low=low, high=high, log=log, grid=[])
    grid = sorted({float(whole.legal(value)) for value in _spread(low, high, log)})
    return msgspec.structs.replace(whole, grid=grid)


def _spread(low: float, high: float, log: bool) -> Iterator[float]:
    """`GRID_POINTS` values from end to end, by factors where the parameter is one of magnitude."""
    for index in range(GRID_POINTS):
        share = index / (GRID_POINTS - 1)
        yield math.exp(math.log(low) + share * math.log(high / low)) if log else low + share * (high - low)


def name_of(strategy: Strategy) -> str:
    """`replay`, `ewc`, ...: as the configuration names it."""
    return next(name for name, kind in BY_NAME.items() if isinstance(strategy, kind))


def values_of(settings: Settings, names: Sequence[str]) -> dict[str, Value]:
    """What the settings say now."""
    tables = {"lora": settings.lora, "training": settings.training}
    tables |= {name_of(strategy): strategy for strategy in settings.strategies}
    return {name: getattr(tables[name.split(".")[0]], name.split(".")[1]) for name in names}


def with_values(settings: Settings, values: Values) -> Settings:
    """The settings with other numbers; alpha follows the rank, so that alpha / rank stays what it was."""
    lora = _changed(settings.lora, "lora", values)
    if "lora.rank" in values:
        lora = msgspec.structs.replace(lora, alpha=settings.lora.alpha / settings.lora.rank * lora.rank)
    return Settings(
        lora=lora,
        training=_changed(settings.training, "training", values),
        strategies=[_changed(strategy, name_of(strategy), values) for strategy in settings.strategies],
    )


def _changed(table: Table, name: str, values: Values) -> Table:
    own = {key.partition(".")[2]: value for key, value in values.items() if key.partition(".")[0] == name}
    return msgspec.structs.replace(table, **own)
