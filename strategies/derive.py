"""Derived rows: a run's new examples in other words (`rewrite`), made once and frozen in `RUN_DIR/derived.jsonl`.

They carry the journal's row of their origin, so that an erasure finds them, and live in the run alone: never in the
journal, so never in the replay buffer, in a hold-out, or in another update. What was retracted is not in an experience,
so nothing is derived of it. A server's answers are cached by the content hash of the origin, since they cost money and
would differ the next time; an erasure removes those as well.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path

import msgspec

from buffers import experience
from buffers.example import Example, content_hash, prompt_hash
from buffers.experience import Role, Row
from strategies import rewriting
from strategies.adapter import Adapter
from strategies.catalog import Rewrite
from strategies.dataset import Item, tokenise
from strategies.request import RunRequest
from strategies.teacher import Teacher, teacher_of

DERIVED = "derived.jsonl"
NEVER_ALIKE: tuple[Role, ...] = ("heldout_new", "heldout_old", "eval")
"""Nothing derived may ask what one of these asks: the tests would no longer be unseen."""


def add_derived(
    items: dict[Role, list[Item]], run_directory: Path, request: RunRequest, adapter: Adapter,
    on_progress: Callable[[], None],
) -> None:  # fmt: skip
    """Put the derived rows beside the others; those of an interrupted run are taken as they were.

    Raises `Failure` where a teacher gives no answer.
    """
    parameters = next((each for each in request.strategies if isinstance(each, Rewrite)), None)
    if parameters is None:
        return
    path, first = run_directory / DERIVED, sum(map(len, items.values()))
    if adapter.backend.rank == 0 and not path.exists():
        cache = None if request.general_cache is None else request.general_cache / "derived"
        teacher = teacher_of(parameters, adapter, request.seed)
        _freeze(path, derive(list(experience.read(run_directory / "experience.jsonl")), parameters, teacher, cache,
                             chat=adapter.tokenizer.chat_template is not None, on_progress=on_progress))  # fmt: skip
    adapter.backend.any(False)  # of several processes the others wait here for the file
    items["derived"] = [
        tokenise(row, index, adapter.tokenizer, request.training.sequence_tokens)
        for index, row in enumerate(experience.read(path), start=first)
    ]


def derived_sha256(run_directory: Path) -> str:
    """Of the frozen rows; empty where nothing was derived."""
    path = run_directory / DERIVED
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def derive(
    rows: Sequence[Row], parameters: Rewrite, teacher: Teacher, cache: Path | None, *, chat: bool,
    on_progress: Callable[[], None] = lambda: None,
) -> Iterator[Row]:  # fmt: skip
    """At most `parameters.rows` of each new row, each once, none that asks what is held out."""
    forbidden = {prompt_hash(row.example) for row in rows if row.role in NEVER_ALIKE}
    known = {content_hash(row.example) for row in rows}
    for row in rows:
        if row.role != "new" or row.example.shape not in ("text", "demonstration"):
            continue
        on_progress()
        made = 0
        for example in _variants(row.example, parameters, teacher, cache, chat=chat):
            if made == parameters.rows:
                break
            if content_hash(example) not in known and prompt_hash(example) not in forbidden:
                known.add(content_hash(example))
                made += 1
                yield Row(role="derived", update=row.update, id=row.id, example=example)


def _variants(
    example: Example, parameters: Rewrite, teacher: Teacher, cache: Path | None, *, chat: bool
) -> Iterator[Example]:
    """Of every way that is switched on, in turn: a teacher's words before those of a rule."""
    taught = (_taught(example, parameters, teacher, cache, chat=chat)
              if parameters.paraphrases or parameters.questions else ())  # fmt: skip
    ruled = [
        way(example)
        for way, is_on in ((rewriting.templates, parameters.templates), (rewriting.sentences, parameters.sentences),
                           (rewriting.chunks, parameters.chunks))
        if is_on
    ]  # fmt: skip
    mixed = chain.from_iterable(zip_longest(*ruled))
    return chain(taught, (variant for variant in mixed if variant is not None))


def _taught(
    example: Example, parameters: Rewrite, teacher: Teacher, cache: Path | None, *, chat: bool
) -> Iterator[Example]:
    asked = _cached(teacher, example, parameters, cache)
    if parameters.paraphrases:
        yield from rewriting.paraphrases(example, asked(rewriting.paraphrase_order(example)))
    if parameters.questions and example.shape == "text":
        said = asked(rewriting.questions_order(example, parameters.rows))
        yield from islice(rewriting.questions(example, said, chat=chat), parameters.rows)


def _cached(teacher: Teacher, example: Example, parameters: Rewrite, cache: Path | None) -> Teacher:
    """The teacher, asked once for one order about one example; not the run's own weights, which change."""
    if cache is None or not parameters.teacher_url:
        return teacher

    def asked(order: str) -> str:
        of = f"{parameters.teacher_url}\n{parameters.teacher_model}\n{order}"
        path = cache / f"{content_hash(example)}.{hashlib.sha256(of.encode()).hexdigest()[:16]}.txt"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _write(path, teacher(order).encode())
        return path.read_text("utf-8")

    return asked


def _freeze(path: Path, rows: Iterator[Row]) -> None:
    _write(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def _write(path: Path, body: bytes) -> None:
    """All of it or nothing, whatever dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
