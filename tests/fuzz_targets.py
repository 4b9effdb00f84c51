"""One function for each parser of what strangers write: any bytes are read, or refused with a `Problem`.

`tests/test_fuzz.py` feeds them with hypothesis, `make fuzz` with atheris. Anything else that is raised is a finding.
"""

import contextlib
import gzip
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import zstandard

from buffers.example import Example
from daemon import exchange
from daemon.config import Watch
from daemon.drop_names import printable, real_name
from daemon.ingest import batch, child, content_text, lines, metadata, packed, strict_json
from daemon.ingest.place import place_of
from daemon.ingest.problem import Problem
from daemon.ingest.prose import Located
from daemon.intake import check_record
from daemon.trust import personal
from daemon.trust.metric import Metric
from daemon.trust.policy import Trust

WATCH = Watch(line_bytes_max=64 * 1024, file_bytes_max=4 * 1024 * 1024)
METRICS = {"stars": Metric(type="float", low=1, high=5)}
Target = Callable[[bytes], None]


@contextlib.contextmanager
def as_file(data: bytes) -> Iterator[int]:
    """A descriptor of a file in memory."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, data)
        yield descriptor
    finally:
        os.close(descriptor)


def read(
    data: bytes, reader: Callable[[int, Watch], Iterator[Located]], spare: tuple[type[Exception], ...] = ()
) -> None:
    """Every example that a parser finds is one that the journal takes."""
    with as_file(data) as descriptor, contextlib.suppress(Problem, *spare):
        for example, line in reader(descriptor, WATCH):
            assert isinstance(example, Example) and example.completion and line >= 0


def in_child(suffix: str) -> Target:
    """A parser of the child process, where memory and recursion have limits whose breach is an answer."""
    return lambda data: read(data, child.READERS[suffix], (MemoryError, RecursionError))


def archived(members: dict[str, bytes], suffix: str) -> Target:
    """A parser of ZIP archives: the first byte says which member the rest stands for, or that it is the whole file."""

    def target(data: bytes) -> None:
        which, rest = (data[0] % (len(members) + 1), data[1:]) if data else (0, b"")
        whole = rest if which == 0 else zipped({**members, sorted(members)[which - 1]: rest})
        in_child(suffix)(whole)

    return target


def zipped(members: dict[str, bytes]) -> bytes:
    """A ZIP archive."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target.getvalue()


EPUB = {
    "META-INF/container.xml": b'<container><rootfiles><rootfile full-path="book.opf"/></rootfiles></container>',
    "book.opf": b'<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="a" href="a.xhtml"/></manifest>'
    b'<spine><itemref idref="a"/></spine></package>',
    "a.xhtml": b"<html><body><h1>One</h1><p>First.</p></body></html>",
}


def docx_members() -> dict[str, bytes]:
    """The parts of a Word document that hold its text."""
    import docx

    target = io.BytesIO()
    document = docx.Document()
    document.add_paragraph("It has no end.")
    document.save(target)
    with zipfile.ZipFile(target) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def unpacked(packing: str, inner: str) -> Target:
    """A packed file: the first byte says whether the rest is the archive or what was packed."""
    pack = {"gz": gzip.compress, "zst": zstandard.compress}[packing]

    def target(data: bytes) -> None:
        raw = data[1:] if data[:1] < b"\x80" else pack(data[1:])

        def reader(descriptor: int, watch: Watch) -> Iterator[Located]:
            plain = packed.unpack(descriptor, packing, watch.file_bytes_max)
            try:
                yield from packed.READERS[inner](plain, watch)
            finally:
                os.close(plain)

        read(raw, reader)

    return target


def feedback_lines(data: bytes) -> None:
    """Lines are cut the same however they are read, and each is a record or a bad line; what is written is stable."""
    with as_file(data) as descriptor:
        found = list(lines.read_lines(descriptor, line_bytes_max=WATCH.line_bytes_max, open_end=True))
    assert b"".join(data[each.offset : each.end] for each in found) == data
    for each in found:
        if each.body is None:
            continue
        with contextlib.suppress(Problem):
            identity, canonical = check_record(each.body, 1, "npc", WATCH.line_bytes_max, METRICS)
            assert check_record(canonical, 1, "npc", 2 * WATCH.line_bytes_max, METRICS) == (identity, canonical)


def strictly(data: bytes) -> None:
    """Strict JSON, and what is redacted of it."""
    with contextlib.suppress(Problem):
        value, canonical = strict_json.parse_canonical(data)
        assert strict_json.parse_canonical(canonical) == (value, canonical)
        if isinstance(value, dict):
            personal.redact_tree(value, Trust().redact)


def front_matter(data: bytes) -> None:
    """Metadata at the head of a Markdown file."""
    with as_file(data) as descriptor, contextlib.suppress(Problem):
        metadata.read(Path("/proc/self/fdinfo"), "a.md", descriptor, 0.0)


def manifest(data: bytes) -> None:
    """A batch manifest: no path leads out of its directory."""
    with as_file(data) as descriptor, contextlib.suppress(Problem):
        for path in batch._items("content/npc/act-1/x.batch.json", descriptor):
            assert path.startswith("content/npc/act-1/") and ".." not in path.split("/")


def foreign_rows(data: bytes) -> None:
    """Rows of other tools."""
    with contextlib.suppress(Problem):
        row = strict_json.parse(data)
        for tool in exchange.TOOLS:
            for found in exchange.records_of(tool, [row, row], exchange.Frame(tool=tool, model="npc")):
                assert isinstance(found, ValueError) or msgspec.json.encode(found)


def names(data: bytes) -> None:
    """Names of files: written reversibly, and a place or a problem."""
    name = os.fsdecode(data)
    assert real_name(printable(name)) == name
    with contextlib.suppress(Problem):
        assert place_of(printable(name), ["npc"]).model == "npc"


def plain_jsonl(descriptor: int, watch: Watch) -> Iterator[Located]:
    """Rows of content, whose bad lines are listed."""
    return content_text.read_jsonl(descriptor, watch, [])


TARGETS: dict[str, Target] = {
    "strict_json": strictly, "feedback": feedback_lines, "front_matter": front_matter, "manifest": manifest,
    "rows": foreign_rows, "names": names, "txt": lambda data: read(data, content_text.read_txt),
    "md": lambda data: read(data, content_text.read_md), "jsonl": lambda data: read(data, plain_jsonl),
    **{suffix: in_child(suffix) for suffix in ("json", "yaml", "csv", "tsv", "html", "pdf")},
    "epub": archived(EPUB, "epub"), "docx": archived(docx_members(), "docx"),
    "txt.gz": unpacked("gz", "txt"), "jsonl.zst": unpacked("zst", "jsonl"),
}  # fmt: skip
"""By the name that `make fuzz TARGET=` knows."""

_PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>endobj\n"
    b"4 0 obj<</Length 38>>stream\nBT /F 12 Tf 10 50 Td (It has no end.) Tj ET\nendstream endobj\n"
    b"5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj\ntrailer<</Root 1 0 R>>"
)
_RECORD = (
    b'{"schema":"eternad.feedback/1","id":"01990000-0000-7001-8000-000000000001","ts":"2026-11-22T20:00:00Z",'
    b'"kind":"float","model":"npc","input":{"messages":[{"role":"user","content":"Who?"}]},"metric":"stars",'
    b'"output":{"messages":[{"role":"assistant","content":"Call +49 30 901820"}]},"value":4.5,'
    b'"subject":{"id":"h:0123456789abcdef"},"source":{"app":"game","channel":"hall","reporter":"player"}}\n'
)
_ROWS = b'[{"prompt": "Who?", "completion": "I."}, {"text": "Once."}, {"q": "Who?", "a": "I."}]'
SEEDS: dict[str, list[bytes]] = {
    "strict_json": [_RECORD, b'{"a": [1e5, "\\ud83d\\ude00", null]}'], "feedback": [_RECORD * 2],
    "front_matter": [b"---\nid: a\nvalid_from: 2026-01-01\n---\n# A\n"],
    "manifest": [b'{"files": [{"path": "a/b.md", "size": 3, "sha256": "' + b"0" * 64 + b'"}]}'],
    "rows": [
        b'{"id":"t","input":"Who?","output":"I.","scores":[{"id":"s","name":"n","dataType":"BOOLEAN","value":1}]}',
        b'{"id":"r","fields":{"prompt":"Who?","a":"I.","b":"He."},"responses":{"p":[{"value":["a","b"]}]}}',
        b'{"id":1,"data":{"prompt":"Who?","a":"I."},"annotations":[{"id":1,"result":[{"id":"x","from_name":"n",'
        b'"type":"rating","value":{"rating":3}}]}]}',
    ],
    "names": [b"content/npc/a.md", b"feedback/npc/game/e.jsonl"], "txt": [b"Q: Who?\nA: I.\n\nProse. More of it.\n"],
    "md": [b"---\nid: a\n---\n# A\n\n**Q:** Who?\n**A:** I.\n\n- x\n\n```\ny\n```\n"],
    "jsonl": [b'{"text": "Once."}\n'],
    "json": [_ROWS, b'{"nodes":{"a":{"says":"Hi.","replies":[{"says":"Who?","to":"b"}]},"b":{"says":"I."}}}'],
    "yaml": [b"- q: Who?\n  a: |\n    I.\n- text: 'x'\n", b"- 1: x\n",
             b"nodes: {1: {says: a, replies: [{says: b, to: [1]}]}}\n"],
    "csv": [b'prompt,completion\n"Who, then?",I\n'],
    "tsv": [b"question\tanswer\nWho?\tI.\n"], "html": [b"<html><main><h1>A</h1><p>One<br>two</p></main></html>"],
    "pdf": [_PDF], "epub": [b"\0" + zipped(EPUB), b"\1" + EPUB["META-INF/container.xml"], b"\2" + EPUB["a.xhtml"],
                            b"\3" + EPUB["book.opf"]],
    "docx": [b"\0" + zipped(docx_members()), *(
        bytes([number + 1]) + data for number, (name, data) in enumerate(sorted(docx_members().items()))
        if name in ("word/document.xml", "[Content_Types].xml", "_rels/.rels")
    )],
    "txt.gz": [b"\0" + gzip.compress(b"Q: Who?\nA: I.\n"), b"\xffQ: Who?\nA: I.\n"],
    "jsonl.zst": [b"\0" + zstandard.compress(b'{"text": "Once."}\n'), b'\xff{"text": "Once."}\n'],
}  # fmt: skip
