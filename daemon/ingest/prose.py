"""Prose and questions with answers: the blocks of a document become examples, in bounded memory.

`Q:` / `A:` pairs become demonstrations. Everything else becomes `text` examples of about `chunk_characters`, cut at
paragraph boundaries that the content itself decides: an edit changes the chunks around it, the others keep their hash.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from buffers.example import Example, Message

ANSWER_CHUNKS_MAX = 8
"""An answer ends at a heading, a rule or the next question, and at the latest after so many chunks' worth of text."""


class Block(msgspec.Struct, frozen=True):
    """A paragraph, list, code block, heading or rule of a document."""

    mark: Literal["heading", "text", "rule"]
    text: str
    line: int
    """Where it begins, 1-based."""
    level: int = 0
    """Of a heading: 1 to 6."""


Located = tuple[Example, int]
"""An example and the line where it begins."""

_OPENING = r"^\s*(?:[-*+]\s+)?(?:\*\*|__)?{}\s*:\s*(?:\*\*|__)?\s*(.*)$"
_QUESTION = re.compile(_OPENING.format("Q(?:uestion)?"))
_ANSWER = re.compile(_OPENING.format("A(?:nswer)?"))

_RULE = re.compile(r"\s*(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})\s*")


def examples(blocks: Iterable[Block], chunk_characters: int) -> Iterator[Located]:
    """Every example of a document, in its order. A question without an answer stays prose."""
    document = _Document(chunk_characters)
    for block in blocks:
        yield from document.feed(block)
    yield from document.end()


def is_rule(paragraph: str) -> bool:
    """Whether a paragraph of plain text is a line like `---` or `* * *`."""
    return _RULE.fullmatch(paragraph) is not None


class _Pair:
    """A question and its answer as they grow, line by line."""

    def __init__(self, question: str, line: int) -> None:
        self.line, self.question = line, [question]
        self.answer: list[str] = []
        self.answered = False
        self.characters = 0

    def add(self, text: str) -> None:
        (self.answer if self.answered else self.question).append(text)
        self.characters += len(text)

    def example(self) -> Example | None:
        question, answer = "\n".join(self.question).strip(), "\n".join(self.answer).strip()
        if not question or not answer:
            return None
        return Example(shape="demonstration", prompt=(Message("user", question),), completion=answer)


class _Document:
    """Sorts the blocks of one document into pairs and prose."""

    def __init__(self, chunk_characters: int) -> None:
        self._chunker = Chunker(chunk_characters)
        self._answer_max = ANSWER_CHUNKS_MAX * chunk_characters
        self._pair: _Pair | None = None

    def feed(self, block: Block) -> Iterator[Located]:
        if block.mark != "text":
            yield from self._end_pair()
            yield from self._chunker.heading(block)
            return
        loose: list[str] = []
        for number, line in enumerate(block.text.split("\n"), block.line):
            yield from self._line(line, number, loose)
        if loose:
            yield from self._prose("\n".join(loose), block.line)
        yield from self._end_block()

    def end(self) -> Iterator[Located]:
        yield from self._end_pair()
        yield from self._chunker.flush()

    def _line(self, line: str, number: int, loose: list[str]) -> Iterator[Located]:
        if found := _QUESTION.match(line):
            yield from self._end_pair()
            self._pair = _Pair(found[1], number)
        elif self._pair is None:
            loose.append(line)
        elif not self._pair.answered and (found := _ANSWER.match(line)):
            self._pair.answered = True
            self._pair.add(found[1])
        elif not self._pair.answered and self._pair.question[-1] == "":  # no answer after the question's paragraph
            yield from self._end_pair()
            loose.append(line)
        else:
            self._pair.add(line)

    def _end_block(self) -> Iterator[Located]:
        if self._pair is not None and self._pair.characters > self._answer_max:
            yield from self._end_pair()
        if self._pair is not None:
            self._pair.add("")

    def _end_pair(self) -> Iterator[Located]:
        pair, self._pair = self._pair, None
        if pair is None:
            return
        example = pair.example()
        if example is not None:
            yield example, pair.line
        else:
            yield from self._prose("\n".join([*pair.question, *pair.answer]).strip(), pair.line)

    def _prose(self, text: str, line: int) -> Iterator[Located]:
        yield from self._chunker.paragraph(text, line)


class Chunker:
    """Packs paragraphs into chunks, under the chain of headings that they stand below.

    After a paragraph that brings a chunk to half of its size or more, the chunk ends with a probability that grows with
    the paragraph's length; the "draw" is the paragraph's own hash, so the same text is always cut at the same places.
    """

    def __init__(self, characters: int) -> None:
        self._characters = characters
        self._chain: list[Block] = []
        self._parts: list[str] = []
        self._size = self._line = 0

    def heading(self, block: Block) -> Iterator[Located]:
        """A heading (or a rule) ends the chunk before it."""
        yield from self.flush()
        if block.mark == "heading":
            self._chain = [*(each for each in self._chain if each.level < block.level), block]

    def paragraph(self, text: str, line: int) -> Iterator[Located]:
        """Add one; longer ones than a chunk are cut at the ends of sentences first."""
        for part, offset in _sentences(text.strip("\n"), self._characters):
            yield from self._add(part, line + offset)

    def _add(self, part: str, line: int) -> Iterator[Located]:
        if not part.strip():
            return
        if self._parts and self._size + len(part) > 1.5 * self._characters:
            yield from self.flush()
        if not self._parts:
            self._line = line
        self._parts.append(part)
        self._size += len(part)
        if 2 * self._size >= self._characters and _draw(part) * self._characters < 2 * len(part):
            yield from self.flush()

    def flush(self) -> Iterator[Located]:
        """The chunk that is being packed, if any."""
        if not self._parts:
            return
        headings = [f"{'#' * each.level} {each.text}" for each in self._chain]
        text = "\n\n".join([*headings, *(part.strip() for part in self._parts)])
        self._parts, self._size = [], 0
        yield Example(shape="text", completion=text), self._line


def _draw(text: str) -> float:
    """Uniform in [0, 1), decided by the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


_SENTENCE = re.compile(r"(?<=[.!?…»”])\s+(?=\S)|\n")


def _sentences(text: str, limit: int) -> Iterator[tuple[str, int]]:
    """(part, lines before it): the text itself, or its sentences packed up to `limit` when it is longer."""
    if len(text) <= limit:
        yield text, 0
        return
    start = last = 0
    for end in [*(found.end() for found in _SENTENCE.finditer(text)), len(text)]:
        if end - start > limit and last > start:
            yield text[start:last], text.count("\n", 0, start)
            start = last
        while end - start > limit:  # one sentence longer than a chunk
            yield text[start : start + limit], text.count("\n", 0, start)
            start += limit
        last = end
    if start < len(text):
        yield text[start:], text.count("\n", 0, start)
