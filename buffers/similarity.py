"""More of those past updates that resemble what is new the least: what is alike is rehearsed by learning the new.

After InsCL (Wang et al., arXiv:2403.11435), which replays more of the tasks whose instructions are farther from the new
task's; there the distance is between embeddings of a language model, here between hashed n-grams of characters, so that
no model is needed:

    P(example of update k stays) grows with d_k = max(1 - cos(v_k, v_new), 0.05)

v: mean over a few examples of their n-gram counts, hashed into `SLOTS` places. An example of update k with the uniform
weight u gets the key u^(1 / d_k), and the largest keys are a sample weighted by d (Efraimidis & Spirakis 2006).
"""

import heapq
import math
import zlib
from collections.abc import Iterable, Iterator

from buffers.example import Example, parse
from buffers.policy import Buffer, Candidate, Past

SLOTS = 512
N = 4
SAMPLED = 32
"""Examples of each update that are looked at: those with the largest weights, a uniform sample."""
NEAREST = 0.05
"""The least distance: what is just like the new is still rehearsed a little."""

Vector = list[float]


def similarity(past: Past, buffer: Buffer) -> Iterator[Candidate]:  # noqa: ARG001 - the policies' contract
    """One stream per past update, each in its reservoir order, merged by the weighted key."""
    new = vector(map(parse, past.new_bodies(SAMPLED)))
    streams = [_keyed(past, update, distance(new, vector(map(parse, past.bodies_of(update, SAMPLED)))))
               for update in past.updates()]  # fmt: skip
    return (candidate for _, candidate in heapq.merge(*streams))


def _keyed(past: Past, update: int, apart: float) -> Iterator[tuple[tuple[float, int], Candidate]]:
    """(-log of the key's reciprocal, ascending) and candidate: log u / d falls as u^(1/d) does."""
    for candidate in past.of_update(update):
        yield (-math.log(candidate.weight) / apart, candidate.id), candidate


def vector(examples: Iterable[Example]) -> Vector:
    """(SLOTS,) counts of the n-grams of what examples ask and say, of length 1; all zero for no examples."""
    counts = [0.0] * SLOTS
    for example in examples:
        for place in _slots(_words(example)):
            counts[place] += 1.0
    length = math.sqrt(sum(count * count for count in counts))
    return [count / length for count in counts] if length else counts


def _slots(text: str) -> Iterator[int]:
    """Where each n-gram counts; CRC-32, since `hash` differs from process to process."""
    body = f" {' '.join(text.lower().split())} ".encode()
    return (zlib.crc32(body[at : at + N]) % SLOTS for at in range(max(len(body) - N + 1, 1)))


def _words(example: Example) -> str:
    if isinstance(example.prompt, str):
        return f"{example.prompt} {example.completion}"
    return " ".join([*(message.content for message in example.prompt if message.role == "user"), example.completion])


def distance(one: Vector, other: Vector) -> float:
    """1 - cosine, at least `NEAREST`."""
    return max(1.0 - sum(a * b for a, b in zip(one, other, strict=True)), NEAREST)
