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

    mark: Literal["heading", "text", "code", "rule"]
    """`code` is prose in which nobody looks for questions."""
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

    def __init__(self, question: str, source: str, line: int) -> None:
        self.line = line
        self._parts: list[list[str]] = [[question]]
        self._source = [source]
        self.characters = 0

    @property
    def is_answered(self) -> bool:
        return len(self._parts) > 1

    @property
    def is_question_over(self) -> bool:
        """Whether the question's paragraph ended, so that only `A:` can follow."""
        return not self.is_answered and self._parts[0][-1] == ""

    def answer(self, text: str, source: str) -> None:
        self._parts.append([])
        self.add(text, source)

    def add(self, text: str, source: str) -> None:
        self._parts[-1].append(text)
        self._source.append(source)
        self.characters += len(text)

    def example(self) -> Example | None:
        texts = ["\n".join(part).strip() for part in self._parts]
        if len(texts) < 2 or not all(texts):
            return None
        return Example(shape="demonstration", prompt=(Message("user", texts[0]),), completion=texts[1])

    def source(self) -> str:
        """What the writer wrote, for a question that turned out to have no answer."""
        return "\n".join(self._source).strip()


class _Document:
    """Sorts the blocks of one document into pairs and prose."""

    def __init__(self, chunk_characters: int) -> None:
        self._chunker = Chunker(chunk_characters)
        self._answer_max = ANSWER_CHUNKS_MAX * chunk_characters
        self._pair: _Pair | None = None

    def feed(self, block: Block) -> Iterator[Located]:
        if block.mark in ("heading", "rule"):
            yield from self._end_pair()
            yield from self._chunker.heading(block)
            return
        loose: list[str] = []
        for number, line in enumerate(block.text.split("\n"), block.line):
            yield from self._line(line, number, loose, is_code=block.mark == "code")
        if loose:
            yield from self._chunker.paragraph("\n".join(loose), block.line)
        yield from self._end_block()

    def end(self) -> Iterator[Located]:
        yield from self._end_pair()
        yield from self._chunker.flush()

    def _line(self, line: str, number: int, loose: list[str], *, is_code: bool) -> Iterator[Located]:
        if not is_code and (found := _QUESTION.match(line)):
            yield from self._end_pair()
            self._pair = _Pair(found[1], line, number)
        elif self._pair is None:
            loose.append(line)
        elif not is_code and not self._pair.is_answered and (found := _ANSWER.match(line)):
            self._pair.answer(found[1], line)
        elif self._pair.is_question_over:  # no answer after the question's paragraph
            yield from self._end_pair()
            loose.append(line)
        else:
            self._pair.add(line, line)

    def _end_block(self) -> Iterator[Located]:
        if self._pair is not None and self._pair.characters > self._answer_max:
            yield from self._end_pair()
        if self._pair is not None:
            self._pair.add("", "")

    def _end_pair(self) -> Iterator[Located]:
        pair, self._pair = self._pair, None
        if pair is None:
            return
        example = pair.example()
        if example is None:
            yield from self._chunker.paragraph(pair.source(), pair.line)
        else:
            yield from self._chunker.flush()
            yield example, pair.line


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
