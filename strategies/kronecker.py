"""EWC in the space of the weights that LoRA changes: dW = s B A, not A and B.

    lambda/2 sum_layers c sum_ij g_i a_j (dW - dW*)_ij^2      (Kirkpatrick et al., arXiv:1612.00796)

    a: (inputs,)   g: (outputs,), both scaled to mean 1   c: the layer's mean importance

The Fisher information of W_ij is F_ij = sum_t (dL/dy_ti x_tj)^2 over the tokens t of an example, taken as independent;
c g a^T is the rank-one matrix with its row and column sums, the closest one in generalised KL (Shazeer & Stern,
arXiv:1804.04235, for Adafactor):

    a ~ sum_t x_tj^2 |dL/dy_t|^2     g ~ sum_t (dL/dy_ti)^2 |x_t|^2     mean of F = sum_t |dL/dy_t|^2 |x_t|^2 / (in out)

K-FAC's diagonal (Martens & Grosse, arXiv:1503.05671) is E[x_j^2] E[(dL/dy_i)^2]; it takes inputs and gradients as
independent too, which language models are not: the first token has inputs thousands of times larger than others and
hardly a gradient, and one layer got 96 % of all importance for it.

dW - dW* is never formed. With U = [B - B*, B*] (outputs, 2 rank) and V = [A; A - A*] (2 rank, inputs) it is s U V, so

    sum_ij g_i a_j (U V)_ij^2 = tr((U^T G U) (V D V^T)),   G = diag(g), D = diag(a)

in O(rank^2 (inputs + outputs)) time and O(inputs + outputs) memory beside the anchor. Against EWC on A and B:

- it does not depend on how A and B factor dW (B R^-1, R A has another EWC penalty for the same model);
- it holds from the first update: at B = 0 the gradient of A is 0, but the importance of dW is not.

Several updates: the importance decays and adds up as in online EWC. A sum of rank-one matrices c g a^T has rank two;
kept is again the rank-one matrix with the same row and column sums.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from strategies import catalog
from strategies.dataset import Item
from strategies.ewc import drawn, on_device
from strategies.learner import JsonNotes, Learner, Loop, Parameters


@dataclass(slots=True)
class Factors:
    """One layer's importance c g a^T."""

    a: Tensor
    """(inputs,) float32, mean 1"""
    g: Tensor
    """(outputs,) float32, mean 1"""
    c: float
    """Mean importance of the layer's weights."""


def factors(a: Tensor, g: Tensor) -> Factors:
    """Column sums (inputs,) and row sums (outputs,) of F -> mean-one factors; a layer without gradient gets c = 0."""
    mean_a, mean_g = float(a.mean()), float(g.mean())
    return Factors(a / (mean_a or 1.0), g / (mean_g or 1.0), mean_a / len(g))


def merged(past: Factors, new: Factors, decay: float) -> Factors:
    """decay past + new, as the rank-one matrix with that sum's row and column sums."""
    old = decay * past.c
    total = old + new.c
    share = new.c / total if total else 0.0
    return Factors(torch.lerp(past.a, new.a, share), torch.lerp(past.g, new.g, share), total)


def pull(
    A: Tensor, B: Tensor, anchor_A: Tensor, anchor_B: Tensor, importance: Factors, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradient of 1/2 c sum_ij g_i a_j (s B A - s B* A*)_ij^2: (value, d/dA, d/dB)."""
    U = torch.cat([B - anchor_B, anchor_B], dim=1)  # (outputs, 2 rank)
    V = torch.cat([A, A - anchor_A], dim=0)  # (2 rank, inputs)
    GU, VD = importance.g[:, None] * U, V * importance.a
    inner = VD @ V.T  # (2 rank, 2 rank)
    weight = importance.c * scaling**2
    value = weight / 2 * ((U.T @ GU) * inner).sum()
    rank = len(A)
    return value, weight * (B.T @ GU) @ VD, weight * GU @ inner[:, :rank]


@dataclass(slots=True)
class Layer:
    """A LoRA layer's parts: A and B are views of the adapter's flat vector, their gradients of its gradient."""

    module: nn.Module
    A: Tensor
    B: Tensor
    slope_a: Tensor
    slope_b: Tensor
    scaling: float

    def cut(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's A and B out of another vector (parameters,) of the same order."""
        parts = (vector[part.storage_offset() :][: part.numel()].view_as(part) for part in (self.A, self.B))
        return next(parts), next(parts)


def layers_of(adapter: Parameters) -> list[Layer]:
    """The LoRA layers, in the model's order."""
    found = []
    for module in adapter.model.modules():
        if isinstance(module, PeftLinear):
            A, B = (cast(nn.Parameter, part["default"].weight) for part in (module.lora_A, module.lora_B))
            slopes = cast(Tensor, A.grad), cast(Tensor, B.grad)
            found.append(Layer(module, A.detach(), B.detach(), *slopes, float(module.scaling["default"])))
    return found


class Moments:
    """Collects the row and column sums of layers' Fisher information while gradients are computed."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.inputs = [torch.zeros(layer.A.shape[1], device=layer.A.device) for layer in layers]
        self.outputs = [torch.zeros(layer.B.shape[0], device=layer.B.device) for layer in layers]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, every forward and backward pass counts."""
        hooks = [layer.module.register_forward_hook(self._hook(place)) for place, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, place: int) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = inputs[0].detach().flatten(0, -2)
                output.register_hook(lambda gradient: self._add(place, x.float(), gradient.flatten(0, -2).float()))

        return see

    def _add(self, place: int, x: Tensor, gradient: Tensor) -> None:
        """x: (tokens, inputs), gradient: (tokens, outputs)"""
        inputs, outputs = x.square(), gradient.square()
        self.inputs[place] += outputs.sum(1) @ inputs
        self.outputs[place] += inputs.sum(1) @ outputs

    def factors(self, examples: int) -> list[Factors]:
        """Means over examples."""
        return [factors(a / examples, g / examples) for a, g in zip(self.inputs, self.outputs, strict=True)]


def normalised(importances: Sequence[Factors]) -> list[Factors]:
    """Scaled so that the mean importance over all weights of all layers is 1; all zero stays all zero."""
    sizes = [len(item.a) * len(item.g) for item in importances]
    mean = sum(item.c * size for item, size in zip(importances, sizes, strict=True)) / sum(sizes)
    return [Factors(item.a, item.g, item.c / mean if mean else 0.0) for item in importances]


class KroneckerConsolidation(Learner, supports_distributed=True):
    """EWC on dW. State: inputs, outputs (all layers' factors end to end), scales (layers,), mean (parameters,)."""

    name = "kronecker"

    def __init__(self, parameters: catalog.Kronecker) -> None:
        super().__init__()
        self.parameters = parameters
        self.importances: list[Factors] = []
        self.mean: Tensor | None = None
        self.saved: Mapping[str, Tensor] = {}
        self.updates = 0

    def load_state(self, tensors: Mapping[str, Tensor], notes: JsonNotes) -> None:
        """The importances and the anchor of all past updates; cut into layers when the adapter is known."""
        self.saved, self.updates = tensors, notes.get("updates", 0)

    def state(self) -> tuple[dict[str, Tensor], JsonNotes]:
        """Nothing before the first anchor."""
        if self.mean is None:
            return dict(self.saved), {"updates": self.updates} if self.saved else {}
        tensors = {
            "inputs": torch.cat([item.a for item in self.importances]),
            "outputs": torch.cat([item.g for item in self.importances]),
            "scales": torch.tensor([item.c for item in self.importances], dtype=torch.float64),
            "mean": self.mean,
        }
        return tensors, {"updates": self.updates}

    def before_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Anchor on the pre-training task, when that is asked for, there is general text and no other anchor yet."""
        general = drawn(strategy.items["general"], self.parameters.samples, strategy.generator)
        self._settle(strategy)
        if self.parameters.general and self.mean is None and general:
            found = self._measure(strategy, general)
            self.importances = [Factors(item.a, item.g, item.c * self.parameters.general) for item in found]
            self.mean = strategy.adapter.flat.detach().clone()

    def after_backward(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Add lambda times the penalty's gradient to that of A and B."""
        self._settle(strategy)
        if self.mean is None:
            return
        penalty = torch.zeros((), device=self.mean.device)
        for layer, importance in zip(layers_of(strategy.adapter), self.importances, strict=True):
            value, d_A, d_B = pull(layer.A, layer.B, *layer.cut(self.mean), importance, layer.scaling)
            layer.slope_a.add_(d_A, alpha=self.parameters.strength)
            layer.slope_b.add_(d_B, alpha=self.parameters.strength)
            penalty += value
        strategy.report(self.name, "penalty", self.parameters.strength * float(penalty))

    def after_training_exp(self, strategy: Loop, *_: Any, **__: Any) -> None:
        """Measure the importances at the weights that are kept, add them to the decayed old ones, recentre."""
        self._settle(strategy)
        items = drawn(strategy.items["new"], self.parameters.samples, strategy.generator)
        if not items:
            return
        new = self._measure(strategy, items)
        if self.importances:
            pairs = zip(self.importances, new, strict=True)
            new = [merged(past, fresh, self.parameters.decay) for past, fresh in pairs]
        self.importances, self.mean = new, strategy.adapter.flat.detach().clone()
        self.updates += 1
        strategy.report(self.name, "updates", self.updates)

    def _measure(self, loop: Loop, items: Sequence[Item]) -> list[Factors]:
        moments = Moments(layers_of(loop.adapter))
        with moments.watching():
            for item in items:
                loop.gradient_of([item])
        found = moments.factors(len(items))
        return normalised(found) if self.parameters.normalise else found

    def _settle(self, loop: Loop) -> None:
        """Cut a loaded state into layers, beside the parameters."""
        if not self.saved:
            return
        flat, layers = loop.adapter.flat, layers_of(loop.adapter)
        self.mean = on_device(self.saved["mean"], flat, self.name)
        inputs = self.saved["inputs"].to(flat.device).split([layer.A.shape[1] for layer in layers])
        outputs = self.saved["outputs"].to(flat.device).split([layer.B.shape[0] for layer in layers])
        scales = self.saved["scales"].tolist()
        self.importances = [Factors(*parts) for parts in zip(inputs, outputs, scales, strict=True)]
        self.saved = {}
