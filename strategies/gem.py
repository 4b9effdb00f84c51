"""Gradient episodic memory: the gradient of a step may not raise the loss on the memory of any past update.

Lopez-Paz & Ranzato, arXiv:1706.08840:

    min_z 1/2 ||z - g||^2   subject to   <z, g_k> >= 0   for every past update k

    g: (parameters,) gradient of the batch      G: (constraints, parameters) reference gradients, rows g_k

Its dual is z = g + G^T v with v = argmin_{v >= gamma} 1/2 v^T (G G^T) v + v^T G g: the quadratic programme needs no
more than the constraints x constraints Gram matrix, so its size does not grow with the model, and sharded gradients
need only their dot products reduced.

gamma is the paper's memory strength (section 3): with 0 the constraints alone hold. They are of first order, and that
is little where something was memorised: near its minimum a loss rises with the square of the step, which no constraint
sees. Above 0 every step also goes towards the memories, which repairs what it did.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from strategies import catalog
from strategies.dataset import Item
from strategies.ewc import drawn
from strategies.learner import JsonNotes, Learner, Loop

TOLERANCE = 1e-6
"""A constraint is met when <z, g_k> >= -TOLERANCE ||g|| ||g_k||: about float32's precision."""
DEPENDENT = 1e-10
"""Squared sine below which a memory's direction counts as a combination of the others'. It cannot be told from them in
a float64 Gram matrix; such a constraint is then met to sqrt(DEPENDENT) = 1e-5 instead of TOLERANCE."""
CHUNK = 1 << 16
"""Parameters converted to float64 at a time: 0.5 MB per row stays in the cache (4-5 times faster than 8 MB)."""


def dots(rows: Tensor, vectors: Tensor) -> Tensor:
    """rows (n, parameters) x vectors (m, parameters) -> their dot products (n, m), accumulated in float64."""
    total = torch.zeros(len(rows), len(vectors), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], CHUNK):
        block = slice(start, start + CHUNK)
        total += rows[:, block].double() @ vectors[:, block].double().T
    return total.cpu()


def multipliers(gram: Tensor, slack: Tensor, scale: float) -> Tensor:
    """The dual's minimiser v >= 0: argmin 1/2 v^T gram v + v^T slack, in float64.

    gram: (constraints, constraints), G G^T; slack: (constraints,), G g; scale: ||g||, the unit of the tolerance.
    Rows are first scaled to unit length, so that memories of very different loss do not spoil each other's precision;
    a memory without gradient constrains nothing.
    """
    lengths = gram.diagonal().sqrt()
    unit = torch.where(lengths > 0, 1 / lengths, 0.0)
    K, q = gram * unit[:, None] * unit[None, :], slack * unit
    return _active_set(K, q, max(scale, float(q.abs().max()))) * unit


def _active_set(K: Tensor, q: Tensor, scale: float) -> Tensor:
    """Lawson & Hanson (1974) in the Gram form of Bro & de Jong (1997), exact after finitely many changes.

    Constraints enter one by one, the most violated first, and leave when their multiplier would turn negative. Only a
    direction that the active ones do not span can be violated (z is orthogonal to all of those), so the systems solved
    stay regular, duplicated and opposite memories included.
    """
    v, active, passed = torch.zeros_like(q), torch.zeros_like(q, dtype=torch.bool), torch.zeros_like(q).bool()
    for _ in range(20 * len(q) + 20):
        violation = torch.where(active | passed, -torch.inf, -(K @ v + q))
        entering = int(violation.argmax())
        if violation[entering] <= TOLERANCE * scale:
            return v
        if _independence(K, active, entering) < DEPENDENT:
            if violation[entering] > 10 * DEPENDENT**0.5 * scale:
                raise ArithmeticError("GEM: no step meets all constraints: is the slack that of these memories?")
            passed[entering] = True
            continue
        active[entering] = True
        v, active = _settle(K, q, v, active)
        passed = torch.zeros_like(passed)
        passed[entering] = not active[entering]  # rounding turned it out at once: without this it would cycle
    raise ArithmeticError("GEM: the active set did not settle: is the Gram matrix positive semi-definite?")


def _independence(K: Tensor, active: Tensor, index: int) -> float:
    """Squared sine between unit row `index` and the span of the active rows (a Schur complement)."""
    if not active.any():
        return 1.0
    cross = K[active, index]
    return float(K[index, index] - cross @ torch.linalg.solve(K[active][:, active], cross))


def _settle(K: Tensor, q: Tensor, v: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Move v to the minimiser on the active rows, dropping those whose multiplier reaches 0 on the way."""
    active = active.clone()
    while active.any():
        target = torch.zeros_like(v)
        target[active] = torch.linalg.solve(K[active][:, active], -q[active])
        if (target[active] > 0).all():
            return target, active
        leaving = torch.where(active & (target <= 0), v / (v - target), torch.inf)
        step = float(leaving.min())
        v = torch.where(leaving > step, v + step * (target - v), 0.0)
        active &= leaving > step
    return torch.zeros_like(v), active


def project(g: Tensor, G: Tensor, gram: Tensor, strength: float = 0.0) -> Tensor | None:
    """The closest gradient (parameters,) to g + strength G^T 1 that meets <z, g_k> >= 0 for all rows g_k of G.

    That is the paper's z with v >= strength. gram: `dots(G, G)`, kept between steps. None: nothing is to be changed.
    """
    v = torch.full((len(G),), strength, dtype=torch.float64)
    lengths = gram.diagonal().sqrt()
    start = g if not strength else _combine(g, G, v)
    scale = float(dots(start[None], start[None]).sqrt())
    slack = dots(G, start[None])[:, 0]
    if (slack >= -TOLERANCE * scale * lengths).all():
        return None if start is g else start
    return _combine(g, G, v + multipliers(gram, slack, scale))


def _combine(g: Tensor, G: Tensor, v: Tensor) -> Tensor:
    """g + G^T v in float64, chunk by chunk: multipliers of nearly equal memories are large and cancel."""
    result = torch.empty_like(g)
    weights = v.to(g.device)
    for start in range(0, len(g), CHUNK):
        block = slice(start, start + CHUNK)
        result[block] = g[block].double() + weights @ G[:, block].double()
    return result


def by_update(items: Sequence[Item], constraints: int) -> dict[int, list[Item]]:
    """The memory of each past update: at most `constraints` of them.

    Where there are more, the latest and evenly spaced older ones stay, so that no age is left out.
    """
    groups: dict[int, list[Item]] = {}
    for item in items:
        if item.label_tokens:
            groups.setdefault(item.update, []).append(item)
    numbers = sorted(groups)
    if len(numbers) > constraints:
        stride = (len(numbers) - 1) / max(constraints - 1, 1)
        numbers = sorted({numbers[-1 - round(index * stride)] for index in range(constraints)})
    return {number: groups[number] for number in numbers}


class GradientEpisodicMemory(Learner, supports_distributed=True):
    """GEM on the adapter's flat gradient. Its memory is the experience's `memory` rows: nothing outlives an update.

    Memory: (constraints, parameters) float32 while training, whatever the number of past updates.
    """

    name = "gem"

    def __init__(self, parameters: catalog.Gem) -> None:
        super().__init__()
        self.parameters = parameters
        self.memory: dict[int, list[Item]] = {}
        self.G: Tensor | None = None
        self.gram: Tensor | None = None
        self.projections = 0

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:
        """A resumed run goes on with the reference gradients and the count that it had."""
        self.G, self.gram = tensors.get("gradients"), None
        self.projections = notes.get("projections", 0)

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """Within a run the reference gradients that later steps still use; between updates nothing."""
        if self.G is None:
            return {}, {}
        tensors = {"gradients": self.G} if self.parameters.refresh_steps > 1 else {}
        return tensors, {"projections": self.projections}

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Group the memory by past update."""
        self.memory = by_update(strategy.items["memory"], self.parameters.constraints)
        strategy.report(self.name, "constraints", len(self.memory))

    def before_training_iteration(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Reference gradients at the current weights, anew every `refresh_steps`, each of other examples.

        The same few of an update at every step would be all of it that is protected.
        """
        if not self.memory or (self.G is not None and strategy.step % self.parameters.refresh_steps):
            return
        batches = [drawn(items, self.parameters.examples, strategy.generator) for items in self.memory.values()]
        self.G = torch.stack([strategy.gradient_of(batch) for batch in batches])
        self.gram = None

    def after_backward(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Add as much of every memory's gradient as the strength asks for, and what else keeps all from harm."""
        if self.G is None:
            return
        gradient = strategy.adapter.gradient
        self.G = self.G.to(gradient.device)
        if self.gram is None:
            self.gram = dots(self.G, self.G)
        projected = project(gradient, self.G, self.gram, self.parameters.strength)
        if projected is not None:
            gradient.copy_(projected)
            self.projections += 1
        strategy.report(self.name, "projections", self.projections)

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:  # noqa: ARG002 - the callback's contract
        """Reference gradients belong to these weights only."""
        self.G, self.gram, self.projections = None, None, 0
