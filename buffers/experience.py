"""Cuts an experience out of the journal: what one update learns from, frozen in one file.

Rows of `experience.jsonl`, in this order of roles: `new` (claimed by the run, trained), `replay` (drawn from the replay
buffer, trained), `memory` (a few examples of each past update, for GEM and A-GEM's reference gradients), `heldout_new`,
`heldout_old` and `eval` (tested, never trained), `general` (rehearsal of general text; from `general_directory`) and
`probe` (general text on which only the drift is measured: it is never trained on and never an anchor). `derived`
rows, new ones in other words, are added by the trainer in a file of its own (`strategies.derive`). Without a
`general_directory` the trainer adds those two from what the base model wrote itself (`strategies.general`).
"""

import hashlib
import os
import random
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from buffers.example import Example, parse
from buffers.policy import Buffer
from buffers.replay_buffer import members

Role = Literal["new", "derived", "replay", "memory", "general", "probe", "heldout_new", "heldout_old", "eval"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `experience.jsonl`."""

    role: Role
    update: int
    """The update in which the example was new (for `new` and `heldout_new`: this one; for `general` and `eval`: 0)."""
    id: int
    """Its row in the journal; 0 for general text."""
    example: Example


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """What was cut: the counts by role, the shortfall of the replay and the hash of the file."""

    sha256: str
    rows: dict[str, int]
    replay_wanted: int
    """Of one epoch."""
    replay_ratio: float
    """Reached share of replayed examples among the trained ones, in every epoch."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each role an experience takes."""

    epochs: int = 1
    """Each shows other replayed and general rows, as far as there are others (`strategies.mix`)."""
    replay_ratio: float = 0.0
    """Of one epoch."""
    whole_buffer: bool = False
    """All of the buffer instead of a share: what a fresh adapter has to learn in a rebase."""
    buffer: Buffer = Buffer()
    """Who is rehearsed; what is not in the buffer has been forgotten."""
    memory_updates: int = 0
    memory_examples: int = 0
    """For GEM and A-GEM: at most so many past updates, so many examples of each."""
    heldout_old_updates: int = 8
    heldout_old_examples: int = 16
    heldout_new_examples: int = 64
    eval_examples: int = 64
    general_ratio: float = 0.0
    general_directory: Path | None = None
    probe_texts: int = 16
    seed: int = 0


def cut(connection: sqlite3.Connection, model: str, run_id: str, update: int, recipe: Recipe, path: Path) -> Cut:
    """Write the experience of a run that has claimed its examples to `path` (fsynced); twice gives the same."""
    draw = random.Random(f"{recipe.seed}/{model}/{update}")
    claimed = "run_id = ? AND split = 'train' AND state = 'claimed' ORDER BY id"
    new = _rows(connection, "new", update, claimed, (run_id,))
    memory = members(connection, model, recipe.buffer, run_id)
    wanted = len(memory) if recipe.whole_buffer else beside(len(new), recipe.replay_ratio)
    replayed = sorted(draw.sample(memory, min(wanted * recipe.epochs, len(memory))))
    at_once = min(wanted, len(memory))
    rows = [*new, *_by_ids(connection, "replay", replayed)]
    rows += _memory(connection, model, recipe, memory)
    rows += _heldout(connection, model, run_id, update, recipe)
    rows += list(_general(recipe, beside(len(new) + at_once, recipe.general_ratio) * recipe.epochs, draw))
    digest = _write(path, rows)
    counted: dict[str, int] = {}
    for row in rows:
        counted[row.role] = counted.get(row.role, 0) + 1
    reached = at_once / (len(new) + at_once) if new else 0.0
    return Cut(sha256=digest, rows=counted, replay_wanted=wanted, replay_ratio=reached)


def read(path: Path) -> Iterator[Row]:
    """The rows of an experience file; raises `msgspec.ValidationError` on a damaged line."""
    decoder = msgspec.json.Decoder(Row)
    with path.open("rb") as file:
        for line in file:
            yield decoder.decode(line)


def _write(path: Path, rows: Iterable[Row]) -> str:
    encoder, digest = msgspec.json.Encoder(), hashlib.sha256()
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        for row in rows:
            line = encoder.encode(row) + b"\n"
            digest.update(line)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return digest.hexdigest()


def _rows(
    connection: sqlite3.Connection, role: Role, update: int | None, where: str, parameters: tuple[object, ...]
) -> list[Row]:
    found = connection.execute(f"SELECT id, update_number, body FROM example WHERE {where}", parameters)
    return [
        Row(role=role, update=number or 0 if update is None else update, id=identity, example=parse(body))
        for identity, number, body in found
    ]


def _by_ids(connection: sqlite3.Connection, role: Role, ids: list[int]) -> list[Row]:
    return [row for identity in ids for row in _rows(connection, role, None, "id = ?", (identity,))]


def _memory(connection: sqlite3.Connection, model: str, recipe: Recipe, buffer: list[int]) -> list[Row]:
    """Examples of past updates that the buffer still holds: GEM may not remember what the buffer has forgotten."""
    if not recipe.memory_updates:
        return []
    held = set(buffer)
    rows: list[Row] = []
    for number in past_updates(connection, model, recipe.memory_updates):
        found = connection.execute(
            "SELECT id FROM example WHERE model = ? AND update_number = ? AND split = 'train' AND state = 'consumed'"
            " ORDER BY weight DESC LIMIT ?",
            (model, number, recipe.memory_examples),
        ).fetchall()
        rows += _by_ids(connection, "memory", [int(row[0]) for row in found if row[0] in held])
    return rows


def past_updates(connection: sqlite3.Connection, model: str, limit: int) -> list[int]:
    """At most `limit` past updates: the latest, and older ones evenly spaced, so that no age is left out."""
    numbers = [
        int(row[0])
        for row in connection.execute(
            "SELECT DISTINCT update_number FROM example WHERE model = ? AND state = 'consumed' ORDER BY 1", (model,)
        )
    ]
    if len(numbers) <= limit:
        return numbers
    stride = (len(numbers) - 1) / max(limit - 1, 1)
    return sorted({numbers[-1 - round(index * stride)] for index in range(limit)})


def _heldout(connection: sqlite3.Connection, model: str, run_id: str, update: int, recipe: Recipe) -> list[Row]:
    rows = _rows(
        connection, "heldout_new", update,
        "run_id = ? AND split = 'heldout' AND state = 'claimed' ORDER BY weight DESC LIMIT ?",
        (run_id, recipe.heldout_new_examples),
    )  # fmt: skip
    for number in past_updates(connection, model, recipe.heldout_old_updates):
        rows += _rows(
            connection, "heldout_old", None,
            "model = ? AND update_number = ? AND split = 'heldout' AND state = 'consumed' ORDER BY weight DESC LIMIT ?",
            (model, number, recipe.heldout_old_examples),
        )  # fmt: skip
    return rows + _rows(
        connection, "eval", 0, "model = ? AND split = 'eval' AND state <> 'retracted' ORDER BY weight DESC LIMIT ?",
        (model, recipe.eval_examples),
    )  # fmt: skip


def _general(recipe: Recipe, wanted: int, draw: random.Random) -> Iterator[Row]:
    if recipe.general_directory is None:
        return
    texts = [
        paragraph.strip()
        for file in sorted(recipe.general_directory.rglob("*.txt"))
        for paragraph in file.read_text("utf-8").split("\n\n")
        if paragraph.strip()
    ]
    yield from general_rows(
        [Example(shape="text", completion=text) for text in texts], wanted, recipe.probe_texts, draw
    )


def general_rows(examples: Sequence[Example], wanted: int, probes: int, draw: random.Random) -> Iterator[Row]:
    """`wanted` general examples to rehearse and `probes` to measure the drift on, never the same; fewer if there are.

    The side is decided by content, so that an example stays on it whatever is added to the others.
    """
    rehearsed = [example for example in examples if not _is_probe(example)]
    for example in draw.sample(rehearsed, min(wanted, len(rehearsed))):
        yield Row(role="general", update=0, id=0, example=example)
    for example in sorted(filter(_is_probe, examples), key=_digest)[:probes]:
        yield Row(role="probe", update=0, id=0, example=example)


def beside(others: int, ratio: float) -> int:
    """How many rows make the share `ratio` of themselves and the `others`."""
    return round(others * ratio / (1 - ratio))


def _digest(example: Example) -> bytes:
    return hashlib.sha256(example.completion.encode()).digest()


def _is_probe(example: Example) -> bool:
    """One text in four. Never an answer to a question: how a model answers is what an update is meant to change."""
    return example.shape == "text" and _digest(example)[0] < 64
