"""The bench's documents: paragraphs of the example's general text and pages of invented lore, in mixed lengths."""

import random
from pathlib import Path

from tokenizers import Tokenizer

from strategies.lore import generate

LENGTHS = (20, 45, 75, 105, 140, 180, 227, 287)
"""Tokens of the documents of every batch: padded to the longest, 47 % of what is computed on are real tokens, as in
random batches of documents of 20 to 287 tokens. Every batch has the same lengths, so that steps can be compared."""


def paragraphs(general: Path, seed: int) -> list[str]:
    """Texts in an order that only the seed decides."""
    texts = [text for file in sorted(general.glob("*.txt")) for text in file.read_text("utf-8").split("\n\n")]
    lore = [" ".join(f"{fact.trained[3]} {fact.answer}." for fact in task) for task in generate(seed, 40, 6)]
    texts = [text.strip() for text in (*texts, *lore) if text.strip()]
    random.Random(seed).shuffle(texts)
    return texts


def batches(
    base: Path, general: Path, count: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 0
) -> list[list[list[int]]]:
    """`count` optimiser batches; texts are strung together until a document has its length."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    texts = paragraphs(general, seed)
    stream = [token for text in texts for token in tokenizer.encode(text + "\n\n").ids]
    draw, place = random.Random(seed), 0
    made: list[list[list[int]]] = []
    for _ in range(count):
        batch = []
        for length in draw.sample(lengths, len(lengths)):
            place = place if place + length <= len(stream) else 0
            batch.append(stream[place : place + length])
            place += length
        made.append(batch)
    return made
