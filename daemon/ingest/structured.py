"""Rows in `.json`, `.yaml`, `.csv` and `.tsv`: one example each, in the shapes of `rows`; read in the child process."""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

from buffers.example import Example, Message
from daemon.config import Watch
from daemon.ingest import rows, strict_json, text
from daemon.ingest.problem import Problem
from daemon.ingest.prose import Located

JSON_BYTES_MAX = 16 * 1024 * 1024
YAML_BYTES_MAX = 1024 * 1024
NODES_MAX = 10_000
_ALIAS = re.compile(r"(?:^|[\s\[{,:-])[&*][A-Za-z0-9_]", re.MULTILINE)


def read_json(descriptor: int, _watch: Watch) -> Iterator[Located]:
    """A list of rows, or one object that is a row or a dialogue tree."""
    yield from _examples(strict_json.parse(_whole(descriptor, JSON_BYTES_MAX).encode()))


def read_yaml(descriptor: int, _watch: Watch) -> Iterator[Located]:
    """The same in YAML 1.2, without aliases (a few lines of them unfold to gigabytes)."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    source = _whole(descriptor, YAML_BYTES_MAX)
    if found := _ALIAS.search(_without_strings(source)):
        line = source.count("\n", 0, found.start()) + 1
        raise Problem("yaml_alias", "anchors and aliases are not read: write the values out", line=line)
    try:
        value = YAML(typ="safe", pure=True).load(source)
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise Problem("invalid_yaml", f"not valid YAML: {' '.join(str(error).split())[:300]}") from None
    yield from _examples(value)


def _without_strings(source: str) -> str:
    """Quoted strings blanked out, so that `"a &b"` is no anchor; plain prose with `*emphasis*` must be quoted."""
    return re.sub(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'", lambda found: " " * len(found[0]), source)


def read_csv(descriptor: int, watch: Watch) -> Iterator[Located]:
    """Rows with a header; comma-separated."""
    return _separated(descriptor, watch, ",")


def read_tsv(descriptor: int, watch: Watch) -> Iterator[Located]:
    """Rows with a header; separated by tabs."""
    return _separated(descriptor, watch, "\t")


def _separated(descriptor: int, watch: Watch, delimiter: str) -> Iterator[Located]:
    csv.field_size_limit(watch.line_bytes_max)
    reader = csv.DictReader(
        io.StringIO(_whole(descriptor, watch.file_bytes_max), newline=""), delimiter=delimiter, strict=True
    )
    try:
        header = [(name or "").strip().lower() for name in reader.fieldnames or []]
        if len(set(header)) != len(header):
            raise Problem("bad_row", f"two columns have the same name: {', '.join(header)}", line=1)
        reader.fieldnames = header
        for row in reader:
            if None in row or None in row.values():
                raise Problem(
                    "bad_row", f"line {reader.line_num} has not as many cells as the header", line=reader.line_num
                )
            yield _example(_cells(row), reader.line_num), reader.line_num
    except csv.Error as error:
        raise Problem("invalid_csv", f"line {reader.line_num}: {error}", line=reader.line_num) from None


def _cells(row: dict[str, str]) -> dict[str, Any]:
    """Empty cells are absent ones, and a label is true or false."""
    cells: dict[str, Any] = {name: cell for name, cell in row.items() if cell.strip()}
    label = cells.get("label", "").strip().lower()
    if label in ("true", "false", "1", "0"):
        cells["label"] = label in ("true", "1")
    return cells


def _whole(descriptor: int, bytes_max: int) -> str:
    text.check(descriptor)
    parts, size = [], 0
    for part in text.texts(descriptor):
        parts.append(part)
        size += len(part)
        if size > bytes_max:
            raise Problem("too_large", f"more than {bytes_max} characters: split the file")
    return "".join(parts)


def _examples(value: Any) -> Iterator[Located]:
    if isinstance(value, dict) and isinstance(value.get("nodes"), dict):
        yield from ((example, 1) for example in dialogue(value))
        return
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, 1):
        yield _example(item, number), number


def _example(row: Any, number: int) -> Example:
    """A row in the shapes of `rows`, or `question` and `answer` (`q`, `a`)."""
    if isinstance(row, dict):
        for question, answer in (("question", "answer"), ("q", "a"), ("Q", "A")):
            if question in row and answer in row:
                row = {"prompt": row[question], "completion": row[answer]}
    try:
        return rows.example_of(row)
    except Problem as problem:
        raise Problem(problem.code, f"row {number}: {problem.message}", line=number) from None


def dialogue(tree: dict[str, Any]) -> list[Example]:
    """A dialogue tree: `{start?, system?, nodes: {NAME: {says, replies: [{says, to}]}}}`.

    Every node that a reply leads to becomes one demonstration: the shortest way to it is the conversation, what the
    node says is the completion. Raises `Problem` for a reply that leads nowhere.
    """
    nodes = tree["nodes"]
    if not 0 < len(nodes) <= NODES_MAX:
        raise Problem("bad_row", f"a dialogue tree has 1 to {NODES_MAX} nodes, not {len(nodes)}")
    start = tree.get("start", next(iter(nodes)))
    if not isinstance(start, str | int):
        raise Problem("bad_row", "`start` of a dialogue tree is the name of a node")
    system = (Message("system", str(tree["system"])),) if tree.get("system") else ()
    ways: dict[str | int, tuple[Message, ...]] = {start: system}
    waiting, found = deque([start]), []
    while waiting:
        name = waiting.popleft()
        says, replies = _node(nodes, name)
        way = ways[name]
        if way != system:
            found.append(Example(shape="demonstration", prompt=way, completion=says))
        for said, to in replies:
            if to not in ways:
                ways[to] = (*way, Message("assistant", says), Message("user", said))
                waiting.append(to)
    return found


def _node(nodes: dict[str | int, Any], name: Any) -> tuple[str, list[tuple[str, Any]]]:
    node = nodes.get(name) if isinstance(name, str | int) else None
    if not isinstance(node, dict) or not isinstance(node.get("says"), str) or not node["says"].strip():
        raise Problem("bad_row", f"the dialogue node {str(name)[:64]!r} is missing, or has no `says`")
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise Problem("bad_row", f"`replies` of the dialogue node {str(name)[:64]!r} must be a list")
    for reply in replies:
        if (
            not isinstance(reply, dict)
            or not isinstance(reply.get("says"), str)
            or not isinstance(reply.get("to"), str | int)
        ):
            raise Problem("bad_row", f"a reply of the dialogue node {str(name)[:64]!r} needs `says` and `to`")
    return node["says"], [(reply["says"], reply["to"]) for reply in replies]
