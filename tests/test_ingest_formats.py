"""Formats that are read in a child process: what they give, and what their bombs cost."""

import gzip
import io
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from buffers.example import Example, Message, parse
from daemon import ingest
from daemon.config import Config, Engine, Model, Watch
from daemon.ingest import packed, sandbox
from daemon.ingest.outcome import Outcome
from daemon.ingest.problem import Problem
from daemon.state import quarantine
from daemon.state.database import open_database
from daemon.state.files import Finished, Signature

NOW = 1_800_000_000.0


class Site:
    """A library and a database with the model `npc`."""

    def __init__(self, directory: Path) -> None:
        self.library = directory / "library"
        self.config = Config(
            library_directory=self.library, state_directory=directory / "state",
            models={"npc": Model(base_path=directory, engine="embedded")}, engines={"embedded": Engine()},
        )  # fmt: skip
        self.database = open_database(directory / "state" / "eternad.db")
        (self.library / "content/npc").mkdir(parents=True)

    def drop(self, name: str, data: bytes | str) -> Outcome:
        """Write a file below content/npc and take it in."""
        relative = f"content/npc/{name}"
        (self.library / relative).write_bytes(data.encode() if isinstance(data, str) else data)
        seen = os.lstat(self.library / relative)
        signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        finished = Finished(path=relative, relative=relative, signature=signature)
        return ingest.ingest_file(self.database, self.config, finished, NOW)

    def examples(self) -> list[Example]:
        """Everything in the journal that counts, in order."""
        found = self.database.execute("SELECT body FROM example WHERE state <> 'retracted' ORDER BY id")
        return [parse(body) for (body,) in found]

    def code(self) -> str:
        """Why the last file was refused."""
        return quarantine.rows(self.database)[0].code


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An empty site."""
    made = Site(tmp_path)
    yield made
    made.database.close()


def asked(question: str, answer: str) -> Example:
    """A demonstration of one question."""
    return Example(shape="demonstration", prompt=(Message("user", question),), completion=answer)


def text(whole: str) -> Example:
    """An example of prose."""
    return Example(shape="text", completion=whole)


def zipped(members: dict[str, bytes]) -> bytes:
    """A ZIP archive."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target.getvalue()


CONTAINER = b'<container><rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
PACKAGE = (
    b'<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="b" href="two.xhtml"/>'
    b'<item id="a" href="a%20one.xhtml"/></manifest><spine><itemref idref="a"/><itemref idref="b"/></spine></package>'
)
EPUB = {
    "META-INF/container.xml": CONTAINER, "OEBPS/book.opf": PACKAGE,
    "OEBPS/two.xhtml": b"<html><body><h1>Two</h1><p>Last.</p></body></html>",
    "OEBPS/a one.xhtml": b'<?xml version="1.0" encoding="utf-8"?><html><body><h1>One</h1><p>First.</p></body></html>',
}  # fmt: skip


def pdf(content: bytes) -> bytes:
    """A PDF of one page with this content stream."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 100]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]  # fmt: skip
    body, offsets = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj%s endobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(body)
    return body + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer


def docx() -> bytes:
    """A Word document with a heading and a paragraph."""
    import docx as library

    document = library.Document()
    document.add_heading("The Library", 1)
    document.add_paragraph("It has no end.")
    target = io.BytesIO()
    document.save(target)
    return target.getvalue()


TREE = {
    "system": "You keep the Library.",
    "nodes": {
        "hall": {
            "says": "Welcome.",
            "replies": [{"says": "Who are you?", "to": "name"}, {"says": "Bye.", "to": "end"}],
        },
        "name": {"says": "Nobody.", "replies": [{"says": "Again?", "to": "hall"}, {"says": "Bye.", "to": "end"}]},
        "end": {"says": "Farewell."},
    },
}
GREETED = (Message("system", "You keep the Library."), Message("assistant", "Welcome."))


def after_greeting(question: str, answer: str) -> Example:
    """A demonstration from the tree."""
    return Example(shape="demonstration", prompt=(*GREETED, Message("user", question)), completion=answer)


@pytest.mark.parametrize(
    ("name", "data", "wanted"),
    [
        ("a.json", '[{"prompt": "Who?", "completion": "I."}, {"text": "Once."}]', [asked("Who?", "I."), text("Once.")]),
        ("a.json", '{"question": "Who?", "answer": "I."}', [asked("Who?", "I.")]),
        (
            "tree.json", msgspec.json.encode(TREE).decode(),
            [
                after_greeting("Who are you?", "Nobody."),
                after_greeting("Bye.", "Farewell."),
            ],
        ),
        (
            "a.yaml", "- q: Who?\n  a: |\n    I.\n    Truly.\n- text: 'a &b *c'\n",
            [asked("Who?", "I.\nTruly.\n"), text("a &b *c")],
        ),
        ("a.csv", '\ufeffPrompt,Completion,note\r\n"Who, then?","I\nam.",\r\n', [asked("Who, then?", "I\nam.")]),
        ("a.tsv", "question\tanswer\nWho?\tI.\n", [asked("Who?", "I.")]),
        (
            "a.html",
            "<html><head><title>x</title><style>p{}</style></head><body><nav>Menu</nav><main><h1>A <i>B</i></h1>"
            "<p>One<br>two</p><script>x()</script><ul><li>Three</ul></main><footer>f</footer></body></html>",
            [text("# A B\n\nOne\ntwo\n\nThree")],
        ),
        ("a.epub", zipped(EPUB), [text("# One\n\nFirst."), text("# Two\n\nLast.")]),
        ("a.docx", docx(), [text("# The Library\n\nIt has no end.")]),
        ("a.pdf", pdf(b"BT /F 12 Tf 10 50 Td (It has no end.) Tj ET"), [text("It has no end.")]),
        ("a.txt.gz", gzip.compress(b"Q: Who?\nA: I.\n"), [asked("Who?", "I.")]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "Once."}\n'), [text("Once.")]),
    ],
)  # fmt: skip
def test_every_format_gives_its_examples(site: Site, name: str, data: bytes | str, wanted: list[Example]) -> None:
    """What stands in the document, in its order, and nothing of its wrapping."""
    outcome = site.drop(name, data)
    assert (outcome.state, outcome.reason) == ("read", "")
    assert site.examples() == wanted


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("content", [b"no archive", b""])
def test_a_broken_archive_leaves_nothing_open(tmp_path: Path, packing: str, content: bytes) -> None:
    """Found by atheris after a thousand of them: the descriptors had run out."""
    path = tmp_path / "a"
    path.write_bytes(content)
    with path.open("rb") as file:
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(Problem, match=r"not a valid|cut off"):
            packed.unpack(file.fileno(), packing, 1 << 20)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_zstandard_is_unpacked(site: Site) -> None:
    """`.zst` like `.gz`."""
    import zstandard

    assert site.drop("a.md.zst", zstandard.ZstdCompressor().compress(b"# H\n\nText.")).new == 1
    assert site.examples() == [text("# H\n\nText.")]


def laughs() -> bytes:
    """An EPUB whose package unfolds to gigabytes where entities are resolved, and reads a file of the machine."""
    entities = b"".join(b'<!ENTITY l%d "%s">' % (n, b"&l%d;" % (n - 1) * 10) for n in range(1, 12))
    package = (
        b'<!DOCTYPE p [<!ENTITY l0 "lol"><!ENTITY x SYSTEM "file:///etc/passwd">' + entities + b"]><p>&l11;&x;</p>"
    )
    return zipped(EPUB | {"OEBPS/book.opf": package})


@pytest.mark.parametrize(
    ("name", "data", "codes"),
    [
        ("a.json", "[" * 100_000, ["too_deep"]),
        ("a.json", '[{"text": "x"}, {"txt": "y"}]', ["bad_row"]),
        ("a.json", '{"nodes": {"a": {"says": "x", "replies": [{"says": "y", "to": "b"}]}}}', ["bad_row"]),
        ("a.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ["yaml_alias"]),
        ("a.yaml", "- [\n", ["invalid_yaml"]),
        ("a.yaml", "- !!python/object/apply:os.system ['true']\n", ["invalid_yaml"]),
        ("a.yaml", "[" * 50_000, ["invalid_yaml", "too_large", "parser_died"]),
        ("a.csv", "prompt,completion\nonly one\n", ["bad_row"]),
        ("a.csv", 'prompt,completion\n"open,x\n', ["invalid_csv"]),
        ("a.csv", "text\n" + "x" * 2_000_000 + "\n", ["invalid_csv"]),
        ("a.epub", zipped(EPUB | {"x": b"\0" * 100_000_000}), ["bomb"]),
        ("a.epub", laughs(), ["invalid_epub", "read"]),
        ("a.epub", b"PK\x03\x04 no archive", ["invalid_archive"]),
        ("a.docx", zipped({"[Content_Types].xml": b"<x/>"}), ["invalid_docx"]),
        ("a.pdf", pdf(b""), ["no_text"]),
        ("a.pdf", b"%PDF-1.7 nothing", ["invalid_pdf"]),
        ("a.txt.gz", gzip.compress(b"\0" * 50_000_000), ["bomb"]),
        ("a.txt.gz", gzip.compress(b"Text.")[:-4], ["invalid_archive"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{\n'), ["invalid_json"]),
        ("a.html", b"\x00" * 1000, ["binary"]),
    ],
)  # fmt: skip
def test_what_is_broken_or_a_bomb_is_refused(site: Site, name: str, data: bytes | str, codes: list[str]) -> None:
    """With a code, in a moment, and without a trace in the journal."""
    started = time.monotonic()
    outcome = site.drop(name, data)
    assert (outcome.state if outcome.state == "read" else site.code()) in codes
    assert site.examples() == []
    assert time.monotonic() - started < 60


COST = """
import os, subprocess, sys
with open(sys.argv[1], "rb") as source:
    command = [sys.executable, "-m", "daemon.ingest.child", sys.argv[2]]
    child = subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE)
    said = child.stdout.read().splitlines()[-1].decode()
    used = os.wait4(child.pid, 0)[2]
print(round(used.ru_utime + used.ru_stime, 2), used.ru_maxrss // 1024, said)
"""


def nested(depth: int) -> bytes:
    """An archive of archives, the innermost of which unpacks to gigabytes."""
    data = zipped({"x": b"\0" * 100_000_000})
    for _ in range(depth):
        data = zipped({f"{number}.zip": data for number in range(8)})
    return data


def quines() -> bytes:
    """A gzip file of a gzip file of a gzip file of zeros."""
    return gzip.compress(gzip.compress(gzip.compress(b"\0" * 100_000_000)))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("epub", zipped(EPUB | {"x": b"\0" * 100_000_000})), ("epub", zipped(EPUB | {"x": nested(2)})),
        ("epub", laughs()), ("docx", zipped({"word/document.xml": b" " * 120_000_000})),
        ("txt.gz", gzip.compress(b"\0" * 100_000_000)), ("jsonl.gz", quines()),
        ("txt.zst", zstandard.compress(b"\0" * 100_000_000)),
    ],
)  # fmt: skip
def test_a_bomb_costs_two_seconds_and_256_mib_at_most(tmp_path: Path, name: str, data: bytes) -> None:
    """Caps fire before anything is unpacked; archives within archives are never opened."""
    (tmp_path / "bomb").write_bytes(data)
    task = msgspec.json.encode(sandbox.Task(name, Watch())).decode()
    command = [sys.executable, "-c", COST, str(tmp_path / "bomb"), task]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    seconds, mebibytes, said = ended.stdout.split(" ", 2)
    assert float(seconds) <= 2 and int(mebibytes) <= 256, ended.stdout
    assert name == "epub" or '"code":""' not in said


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        ("os.kill(os.getpid(), 11)", "signal 11"),
        ("sys.exit(3)", "status 3"),
        ("print('nonsense')", "gave no answer"),
        ("time.sleep(60)", "took longer"),
    ],
)
def test_a_parser_that_dies_is_tried_once_more_and_then_refused(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: str, reason: str
) -> None:
    """The daemon goes on, and the others files with it."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/usr/bin/env python3\nimport os, sys, time\nopen({str(tmp_path / 'runs')!r}, 'a').write('x')\n{break_it}\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox, "TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(sandbox.sys, "executable", str(fake))
    outcome = site.drop("a.csv", "text\nx\n")
    assert outcome.state == "quarantined" and reason in outcome.reason
    assert (tmp_path / "runs").read_text() == "xx"


def test_the_child_has_no_network_and_limits() -> None:
    """What it gives up before it reads a byte."""
    probe = (
        "import resource, socket, daemon.ingest.child as child; child.limit(1000);"
        "print(resource.getrlimit(resource.RLIMIT_FSIZE)[0], resource.getrlimit(resource.RLIMIT_AS)[0] > 0);"
        "bytearray(2 * 1024**3)"
    )
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False, timeout=60)
    assert ended.stdout.split() == ["1000", "True"]
    assert "MemoryError" in ended.stderr


def test_a_document_with_an_id_replaces_its_earlier_version(site: Site) -> None:
    """What only the old version held is withdrawn; dropped again, it counts again."""
    first = "---\nid: keeper\n---\nQ: Who?\nA: Nobody.\n\nQ: Why?\nA: So.\n"
    second = first.replace("Nobody", "Somebody")
    site.drop("one.md", first)
    outcome = site.drop("two.md", second)
    assert (outcome.new, outcome.duplicates, outcome.retracted) == (1, 1, 1)
    assert {each.completion for each in site.examples()} == {"Somebody.", "So."}
    assert site.drop("three.md", first).retracted == 1
    assert {each.completion for each in site.examples()} == {"Nobody.", "So."}


def test_a_sidecar_says_what_front_matter_says(site: Site) -> None:
    """For formats that have none of their own: split, id, what it supersedes, and its time."""
    site.drop("old.md", "---\nid: old\n---\nOld text.")
    (site.library / "content/npc/a.csv.meta.json").write_text('{"supersedes": "old", "split": "eval", "author": "A."}')
    assert site.drop("a.csv", "text\nNew text.\n").retracted == 1
    assert site.database.execute("SELECT split FROM example WHERE state <> 'retracted'").fetchall() == [("eval",)]


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ({"split": "test"}, "bad_metadata"),
        ({"valid_from": "2099-01-01"}, "not_yet_valid"),
        ({"valid_until": "2020-01-01T00:00:00Z"}, "expired"),
        ([], "bad_metadata"),
    ],
)
def test_bad_metadata_refuses_the_file(site: Site, metadata: Any, code: str) -> None:
    """A file with a wrong split would otherwise be trained on."""
    (site.library / "content/npc/a.txt.meta.json").write_bytes(msgspec.json.encode(metadata))
    assert site.drop("a.txt", "Text.").state == "quarantined"
    assert site.code() == code


def test_the_limits_of_the_configuration_reach_the_child(site: Site) -> None:
    """The child knows the same limits as the daemon."""
    site.config = msgspec.structs.replace(site.config, watch=Watch(file_bytes_max=3000))
    assert site.drop("a.txt.gz", gzip.compress(b"x y\n" * 1000)).state == "quarantined"
    assert site.code() == "too_large"
