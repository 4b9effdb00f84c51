"""What a sequence of updates did to each task: pure functions on the accuracy matrix.

R: (updates, tasks), R[i, j] = score on task j (higher is better) after update i; row and column k belong together.
Lopez-Paz & Ranzato, arXiv:1706.08840 (ACC, BWT, FWT); Chaudhry et al., arXiv:1801.10112 (forgetting, intransigence).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def accuracy(R: Matrix) -> float:
    """ACC = 1/T sum_j R[T, j]: the mean score over all tasks after the last update."""
    return float(_square(R)[-1].mean())


def backward_transfer(R: Matrix) -> float:
    """BWT = 1/(T-1) sum_{j<T} R[T, j] - R[j, j]: below 0 means forgetting; 0 for a single task."""
    R = _square(R)
    return float((R[-1, :-1] - R.diagonal()[:-1]).mean()) if len(R) > 1 else 0.0


def forward_transfer(R: Matrix, before: Sequence[float]) -> float:
    """FWT = 1/(T-1) sum_{j>1} R[j-1, j] - before[j], `before` being the scores without any update."""
    R = _square(R)
    if len(before) != len(R):
        raise ValueError(f"forward transfer: {len(before)} scores before any update for {len(R)} tasks")
    return float((R.diagonal(1) - np.asarray(before)[1:]).mean()) if len(R) > 1 else 0.0


def forgetting(R: Matrix) -> float:
    """F = 1/(T-1) sum_{j<T} max_{i<T} R[i, j] - R[T, j]: from the best score ever, where BWT takes the first."""
    R = _square(R)
    return float((R[:-1, :-1].max(axis=0) - R[-1, :-1]).mean()) if len(R) > 1 else 0.0


def intransigence(R: Matrix, joint: Sequence[float]) -> float:
    """I = 1/T sum_j joint[j] - R[j, j]: what a model trained on all tasks at once learns and ours did not."""
    return float((np.asarray(joint) - _square(R).diagonal()).mean())


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of the mean of `values`; raises `ValueError` when there are none."""
    if not len(values):
        raise ValueError("no values to take a mean of")
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(sample), size=(draws, len(sample)))
    low, high = np.quantile(sample[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _square(R: Matrix) -> Matrix:
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise ValueError(f"the accuracy matrix must be square (updates x tasks), not {R.shape}")
    return R
