"""General text for a model without a `general_directory`, or with a small one: written once by the base model itself.

What a model samples from itself replays its training nearly as well as stored text (Marek et al., arXiv:2605.26097),
and a small fixed set is enough (GeRe, Zhang et al., arXiv:2508.04676). A sixth of it answers plain questions, for
rehearsal and anchors alone. The others begin with the token that begins every text, where a chat model writes both
sides of a conversation (Magpie, Xu et al., arXiv:2406.08464); one in four of these measures the drift. After a hot
update they told the same as real text (KL 1.43 against 1.44 nats per token on SmolLM2), where answers told 4.84: their
first tokens alone, which an update on questions and answers is meant to change, moved by 15. Drawn at temperature 1
without top-k or top-p, from the distribution itself.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from buffers.example import Example, Message, canonical, parse
from buffers.experience import Recipe, Role, beside, general_rows
from strategies.adapter import Adapter
from strategies.base_hash import base_sha256
from strategies.canary import decode
from strategies.catalog import Replay
from strategies.dataset import Item, prompt_tokens, tokenise
from strategies.request import RunRequest

TOKENS = 32
"""Longest sample. The first tokens say the most: a KL there already tells whether the model has moved."""
SEED = 0
"""The same for every run: what is kept must not depend on who came first."""
TEXT_BATCHES, TEXTS = 5, 32
"""So many batches of so many texts that begin with nothing: the more anchors, the less room beside them."""
QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "How do I boil an egg?", "What is a noun?",
    "Tell me a short story about a dog.", "How far away is the moon?", "What is seven times eight?",
    "Write a polite letter of complaint.", "What causes the tides?", "Explain what a bank does.",
    "Name three kinds of trees.", "How does a bicycle stay upright?", "What should I cook for four friends?",
    "Who was Charles Darwin?", "Describe a rainy day.", "What is the difference between a crow and a raven?",
    "How can I sleep better?", "Write a function that adds two numbers.", "What is democracy?",
    "Translate into French: good morning.", "Why do leaves turn red in autumn?", "What is a prime number?",
    "Give me a riddle.", "How is paper made?", "What do bees do in winter?", "Recommend a book for a child.",
    "What happened in 1969?", "How do vaccines work?", "Write a haiku about the sea.", "What is inflation?",
    "How do I remove a coffee stain?", "Summarise what a computer is.",
)  # fmt: skip


def add_general(
    items: dict[Role, list[Item]], request: RunRequest, adapter: Adapter, on_progress: Callable[[], None]
) -> None:
    """Give a run the general text to rehearse that its directory lacks, and, without any, some to measure drift on.

    Does nothing where the experience has enough already, or where there is no directory to keep it in. `on_progress`
    is called between batches.
    """
    lacking = _lacking(items, request)
    probes = 0 if items["general"] or items["probe"] else Recipe().probe_texts
    if request.general_cache is None or not (lacking or probes):
        return
    draw = random.Random(f"{request.seed}/{request.model}/{request.update_number}")
    written = kept_or_written(request.base_path, request.general_cache, adapter, on_progress)
    found = general_rows(written, lacking, probes, draw)
    for index, row in enumerate(found, start=sum(map(len, items.values()))):
        item = tokenise(row, index, adapter.tokenizer, request.training.sequence_tokens)
        # a sample that was cut off has not ended: its end is not to be learned
        items[row.role].append(replace(item, tokens=item.tokens[: item.start + TOKENS]))


def _lacking(items: dict[Role, list[Item]], request: RunRequest) -> int:
    """How many more general rows all epochs together would show, where there are too few even for one of them."""
    replay = next((each for each in request.strategies if isinstance(each, Replay)), None)
    if replay is None:
        return 0
    new, held = len(items["new"]), len(items["replay"])
    taught = new + (held if request.rebase else min(beside(new, replay.ratio), held))
    an_epoch, here = beside(taught, replay.general_ratio), len(items["general"])
    return an_epoch * request.training.epochs - here if here < an_epoch else 0


def kept_or_written(
    base_path: Path, cache: Path, adapter: Adapter, on_progress: Callable[[], None] = lambda: None
) -> list[Example]:
    """What this base model wrote the first time it was asked; a damaged file is written anew."""
    path = cache / f"{base_sha256(base_path, cache)}.jsonl"
    try:
        return [parse(line) for line in path.read_bytes().splitlines()]
    except (FileNotFoundError, msgspec.MsgspecError):
        examples = write_general(adapter, on_progress)
        _keep(path, examples)
        return examples


def _keep(path: Path, examples: Sequence[Example]) -> None:
    """All of it or nothing, whatever dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.writelines(canonical(example) + b"\n" for example in examples)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_general(adapter: Adapter, on_progress: Callable[[], None] = lambda: None) -> list[Example]:
    """The base model's own words, each once: answers to `QUESTIONS`, and five times as many texts of its own choice."""
    tokenizer = adapter.tokenizer
    batches: list[list[Example]] = []
    if tokenizer.chat_template is not None:
        asked = [(Message(role="user", content=question),) for question in QUESTIONS]
        batches.append([Example(shape="demonstration", prompt=prompt, completion="-") for prompt in asked])
    batches += [[Example(shape="text", completion="-")] * TEXTS] * TEXT_BATCHES
    written: dict[Example, None] = {}
    for number, batch in enumerate(batches):
        on_progress()
        # a tokenizer that begins texts with nothing is begun with what ends them
        starts = [prompt_tokens(example, tokenizer) or [_first(tokenizer)] for example in batch]
        for example, tokens in zip(batch, sample(adapter, starts, SEED + number), strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if text.strip():
                written[msgspec.structs.replace(example, completion=text)] = None
    return list(written)


def _first(tokenizer: object) -> int:
    begin, end = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    return int(begin if begin is not None else end)  # type: ignore[arg-type]  # `tokenise` demands an end token


@torch.no_grad()
def sample(adapter: Adapter, starts: Sequence[Sequence[int]], seed: int, tokens: int = TOKENS) -> list[list[int]]:
    """The base model's continuation of every start, at temperature 1; no random state outside is touched."""
    end = int(adapter.tokenizer.eos_token_id)
    with adapter.disabled(), torch.random.fork_rng():
        torch.manual_seed(seed)
        # every one said, or the base's own generation_config.json would bend the distribution
        written = decode(adapter, starts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
    return [row[:-1] if row[-1] == end else row for row in written]
