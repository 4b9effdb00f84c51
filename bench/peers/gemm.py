"""The machine's peak: large square matrix products on the thread that the trainers use."""

import time
from typing import Any

import torch

from bench.peers.work import Work, child

SIZE, REPEATS = 2048, 3


def rate(dtype: torch.dtype) -> float:
    """Best FLOP per CPU second of `REPEATS`."""
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(REPEATS):
        began = time.process_time()
        a @ b
        best = min(best, time.process_time() - began)
    return 2 * SIZE**3 / best


def measure(_work: Work, _: str) -> dict[str, Any]:
    """Both precisions."""
    torch.set_num_threads(1)
    return {"float32": rate(torch.float32), "bfloat16": rate(torch.bfloat16)}


if __name__ == "__main__":
    child(measure)
