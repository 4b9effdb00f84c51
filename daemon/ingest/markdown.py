"""Markdown (CommonMark) as blocks: the source of each block, its headings; raw HTML is dropped.

Only the block structure is parsed: what a model should write is the Markdown that the writer wrote.
"""

import re
from collections.abc import Iterator
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from daemon.ingest.problem import Problem
from daemon.ingest.prose import Block

BYTES_MAX = 4 * 1024 * 1024
FRONT_MATTER_MAX = 64 * 1024
_FENCE = re.compile(r"---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9-]*(?:\s[^<>]*)?/?>")


def split_front_matter(text: str) -> tuple[dict[str, Any], str, int]:
    """(metadata, body, lines before the body). Raises `Problem` for YAML that is broken or not a table."""
    found = _FENCE.match(text)
    if found is None:
        return {}, text, 0
    if len(found[1]) > FRONT_MATTER_MAX:
        raise Problem("front_matter", f"front matter of {len(found[1])} characters: at most {FRONT_MATTER_MAX}", line=1)
    return _yaml(found[1]), text[found.end() :], text.count("\n", 0, found.end())


def _yaml(text: str) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if re.search(r"(?:^|[\s\[,:-])[&*][A-Za-z0-9_]", text):
        raise Problem("front_matter", "front matter with YAML anchors or aliases: write the values out", line=1)
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise Problem("front_matter", f"front matter is not valid YAML: {reason}", line=1) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Problem("front_matter", "front matter must be a table of `key: value` lines", line=1)
    return {str(key): each for key, each in value.items()}


def blocks(text: str, first_line: int = 1) -> Iterator[Block]:
    """The blocks of a body that begins at line `first_line` of its file."""
    lines = text.split("\n")
    tokens = _parser().parse(text)
    for index, token in enumerate(tokens):
        if token.level == 0 and token.map is not None and token.type != "html_block":
            block = _block(token, tokens[index + 1] if index + 1 < len(tokens) else token, lines, first_line)
            if block.mark in ("heading", "rule") or block.text.strip():
                yield block


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"maxNesting": 20})
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser


def _block(token: Token, following: Token, lines: list[str], first_line: int) -> Block:
    start, end = token.map or [0, 0]
    line = first_line + start
    if token.type == "heading_open":
        return Block("heading", _without_html(following.content).strip(), line, int(token.tag[1:]))
    if token.type == "hr":
        return Block("rule", "", line)
    source = "\n".join(lines[start:end]).rstrip()
    if token.type in ("fence", "code_block"):
        return Block("code", source, line)
    return Block("text", _without_html(source), line)


def _without_html(text: str) -> str:
    """Inline tags and comments go, what stands between the tags stays."""
    return _TAG.sub("", _COMMENT.sub("", text)) if "<" in text else text
