"""Consolidation of versions: mixing a candidate with the version that it came from. Pure functions on flat vectors.

Averaging the weights of a model before and after fine-tuning keeps most of what was learned and much of what would be
forgotten (Wortsman et al., arXiv:2109.01903). Candidates along the line served -> candidate are tried from the far end;
the first that a judge accepts is taken.

Interpolating A and B is not interpolating dW = s B A:

    dW(w) = (1 - w) dW_0 + w dW_1 - w (1 - w) s (B_1 - B_0)(A_1 - A_0)

The last term is of second order in the update and at most a quarter of s |B_1 - B_0| |A_1 - A_0|. It is small for an
adapter that continues its parent, and anything but small between adapters that started from different A: `merge`
is only for the former.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

WEIGHTS = (1.0, 0.75, 0.5, 0.25)


def merge(served: Tensor, candidate: Tensor, weight: float) -> Tensor:
    """(parameters,) (1 - weight) served + weight candidate; raises `ValueError` for adapters of different size."""
    if served.shape != candidate.shape:
        raise ValueError(f"cannot merge adapters of {served.numel()} and {candidate.numel()} parameters")
    if weight == 1.0:
        return candidate.clone()  # bit for bit, where lerp rounds
    return served.lerp(candidate, weight)


def search(
    served: Tensor,
    candidate: Tensor,
    rise_of: Callable[[Tensor], float],
    rise_max: float,
    weights: Sequence[float] = WEIGHTS,
) -> tuple[float, Tensor, float]:
    """(weight, merge, rise): the largest weight whose merge rises by at most `rise_max`, else the one that rises least.

    `rise_of`: by how much the loss on what must not be forgotten rises under the weights that it is given.
    """
    tried: list[tuple[float, float, Tensor]] = []
    for weight in sorted(weights, reverse=True):
        merged = merge(served, candidate, weight)
        tried.append((rise_of(merged), weight, merged))
        if tried[-1][0] <= rise_max:
            break
    rise, weight, merged = tried[-1] if tried[-1][0] <= rise_max else min(tried, key=lambda one: (one[0], -one[1]))
    return weight, merged, rise


def slow(average: Tensor | None, candidate: Tensor, decay: float, updates: int) -> Tensor:
    """(parameters,) exponential moving average of published adapters: average + (1 - d) (candidate - average).

    d = min(decay, (updates - 1) / updates) for the `updates`-th adapter, from 1: the plain mean of all of them as long
    as they are few, so that the first one is not kept for ever.
    """
    if average is None:
        return candidate.clone()
    return merge(average, candidate, 1 - min(decay, (updates - 1) / updates))
