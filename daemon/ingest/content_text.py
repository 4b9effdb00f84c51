"""Plain formats of content, read in the daemon itself: `.txt`, `.md` and `.jsonl`."""

import os
from collections.abc import Iterator

from daemon.config import Watch
from daemon.ingest import prose, rows, strict_json, text
from daemon.ingest.lines import Line, read_lines
from daemon.ingest.opened import blocks
from daemon.ingest.problem import Problem
from daemon.ingest.prose import Block, Located
from daemon.ingest.refuse import BadLine


def read_txt(descriptor: int, watch: Watch) -> Iterator[Located]:
    """Paragraphs, and questions with answers."""
    text.check(descriptor)
    paragraphs = text.read_paragraphs(descriptor, 64 * watch.chunk_characters)
    blocks = (Block("rule" if prose.is_rule(each) else "text", each, line) for each, line in paragraphs)
    return prose.examples(blocks, watch.chunk_characters)


def read_md(descriptor: int, watch: Watch) -> Iterator[Located]:
    """The same below the headings of a Markdown file; its front matter is metadata, not text."""
    from daemon.ingest import markdown  # its parser is only loaded where there is Markdown

    size = os.fstat(descriptor).st_size
    if size > markdown.BYTES_MAX:
        message = f"{size} bytes of Markdown: at most {markdown.BYTES_MAX} are parsed at once; split the file"
        raise Problem("too_large", message)
    text.check(descriptor)
    _, body, lines = markdown.split_front_matter("".join(text.texts(descriptor)))
    return prose.examples(markdown.blocks(body, lines + 1), watch.chunk_characters)


def read_jsonl(descriptor: int, watch: Watch, bad: list[BadLine]) -> Iterator[Located]:
    """One row a line; lines that are none are added to `bad`, and the others are read."""
    text.check_magic(next(blocks(descriptor), b""))
    for line in read_lines(descriptor, line_bytes_max=watch.line_bytes_max, open_end=True):
        try:
            yield from _row(line, watch)
        except Problem as problem:
            bad.append(BadLine(line, problem))


def read_jsonl_strictly(descriptor: int, watch: Watch) -> Iterator[Located]:
    """The same for a file that is not there in plain text: its first bad line is a problem of the whole file."""
    bad: list[BadLine] = []
    for located in read_jsonl(descriptor, watch, bad):
        yield located
        if bad:
            break
    for each in bad:
        problem = each.problem
        raise Problem(problem.code, f"line {each.line.number}: {problem.message}", line=each.line.number)


def _row(line: Line, watch: Watch) -> Iterator[Located]:
    if line.body is None:
        raise Problem("line_too_long", f"longer than watch.line_bytes_max = {watch.line_bytes_max}; skipped")
    body = line.body.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else line.body
    if body.strip():
        yield rows.example_of(strict_json.parse(body)), line.number
