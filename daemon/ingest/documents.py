"""Documents with mark-up (`.html`, `.epub`, `.docx`, `.pdf`) as blocks of prose; read in the child process alone.

Nothing is ever fetched: the parsers know no network, and external relations, entities and DTDs are not resolved.
"""

import importlib
import io
import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import lxml.html
from lxml import etree

from daemon.config import Watch
from daemon.ingest import prose, text
from daemon.ingest.problem import Problem
from daemon.ingest.prose import Block, Located

_html: Any = lxml.html  # its functions carry no types
MEMBERS_MAX = 2000
UNPACKED_BYTES_MAX = 128 * 1024 * 1024
RATIO_MAX = 100
PAGES_MAX = 5000
_DAMAGED = (
    etree.LxmlError, zipfile.BadZipFile, zlib.error, LookupError, ValueError, AttributeError, TypeError, EOFError,
    NotImplementedError, RuntimeError, OSError,
)  # fmt: skip
"""What the libraries raise for an archive that is damaged, encrypted or not what it says (found by fuzzing).

A `RecursionError` is a `RuntimeError`, too: a document that is too deep is damaged as well.
"""
_BOILERPLATE = (
    "script", "style", "noscript", "template", "nav", "header", "footer", "aside", "form", "iframe", "svg", "button",
)  # fmt: skip
_BLOCKS = {"p", "li", "blockquote", "pre", "dt", "dd", "td", "th", "figcaption", "div", "section", "article", "body"}
_HEADINGS = {f"h{level}": level for level in range(1, 7)}


def read_html(descriptor: int, watch: Watch) -> Iterator[Located]:
    """The text of a page without navigation, scripts and forms; UTF-8 unless the page says otherwise."""
    text.check_no_nul(_bytes(descriptor))
    return prose.examples(_html_blocks(_bytes(descriptor)), watch.chunk_characters)


def read_epub(descriptor: int, watch: Watch) -> Iterator[Located]:
    """The chapters of a book in the order of its spine."""
    with _archive(descriptor) as archive:
        try:
            blocks = [block for name in _spine(archive) for block in _html_blocks(archive.read(name))]
        except _DAMAGED as error:
            raise Problem("invalid_epub", f"not an EPUB that can be read: {error}") from None
    return prose.examples(blocks, watch.chunk_characters)


def read_docx(descriptor: int, watch: Watch) -> Iterator[Located]:
    """The paragraphs and headings of a Word document."""
    import docx
    from docx.opc.exceptions import OpcError

    data = _bytes(descriptor)
    with _archive(descriptor):
        pass  # its sizes are in bounds
    try:
        document = docx.Document(io.BytesIO(data))
        blocks = [_docx_block(paragraph) for paragraph in document.paragraphs if paragraph.text.strip()]
    except (OpcError, *_DAMAGED) as error:
        raise Problem("invalid_docx", f"not a Word document that can be read: {error}") from None
    return prose.examples(blocks, watch.chunk_characters)


def _docx_block(paragraph: Any) -> Block:
    style = (paragraph.style.name or "") if paragraph.style is not None else ""
    name, _, level = style.partition(" ")
    if name == "Heading" and level.isdigit():
        return Block("heading", paragraph.text.strip(), 1, min(int(level), 6))
    return Block("heading", paragraph.text.strip(), 1, 1) if style == "Title" else Block("text", paragraph.text, 1)


def read_pdf(descriptor: int, watch: Watch) -> Iterator[Located]:
    """The text layer of a PDF; one that only has images is refused."""
    pypdfium2: Any = importlib.import_module("pypdfium2")
    try:
        document = pypdfium2.PdfDocument(_bytes(descriptor))
        if len(document) > PAGES_MAX:
            raise Problem("too_large", f"{len(document)} pages: at most {PAGES_MAX}; split the file")
        pages = [_page(document[number]) for number in range(len(document))]
    except pypdfium2.PdfiumError as error:
        raise Problem("invalid_pdf", f"not a PDF that can be read (damaged, or with a password): {error}") from None
    if not any(page.strip() for page in pages):
        raise Problem("no_text", "the PDF has no text layer: run OCR over it first")
    blocks = [
        Block("text", paragraph, number)
        for number, page in enumerate(pages, 1)
        for paragraph in page.split("\n\n")
        if paragraph.strip()
    ]
    return prose.examples(blocks, watch.chunk_characters)


def _page(page: Any) -> str:
    found: str = page.get_textpage().get_text_range()
    cleaned = found.replace("\r\n", "\n").replace("\ufffe", "").replace("\x00", "")
    return cleaned.encode("utf-8", "ignore").decode()  # half surrogates come out of broken fonts


def _bytes(descriptor: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()


def _archive(descriptor: int) -> zipfile.ZipFile:
    """A ZIP archive whose sizes are in bounds; what is read of it is read into memory, never to a path."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(_bytes(descriptor)))
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise Problem("invalid_archive", f"not a valid ZIP archive: {error}") from None
    members = archive.infolist()
    total, packed = sum(each.file_size for each in members), sum(each.compress_size for each in members)
    if len(members) > MEMBERS_MAX or total > UNPACKED_BYTES_MAX or total > 1024 * 1024 + RATIO_MAX * packed:
        raise Problem(
            "bomb", f"{len(members)} members of {total} bytes in {packed}: more than a document may unpack to"
        )
    return archive


def _spine(archive: zipfile.ZipFile) -> list[str]:
    container = _xml(archive.read("META-INF/container.xml"))
    package_name = str(container.xpath("string(//*[local-name()='rootfile']/@full-path)"))
    package = _xml(archive.read(package_name))
    items = {item.get("id"): item.get("href") for item in package.xpath("//*[local-name()='item']")}
    wanted = [items[each.get("idref")] for each in package.xpath("//*[local-name()='itemref']")]
    base = posixpath.dirname(package_name)
    return [posixpath.normpath(posixpath.join(base, unquote(href.partition("#")[0]))) for href in wanted]


def _xml(data: bytes) -> Any:
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False
    )
    return etree.fromstring(data, parser)


def _html_blocks(data: bytes) -> list[Block]:
    if not data.strip():
        return []
    encoding = None if b"charset" in data[:4096].lower() or b"encoding=" in data[:200] else "utf-8"
    parser = _html.HTMLParser(
        encoding=encoding, no_network=True, remove_comments=True, remove_pis=True, huge_tree=False
    )
    try:
        tree = _html.document_fromstring(data, parser=parser)
    except (etree.LxmlError, ValueError) as error:
        raise Problem("invalid_html", f"not HTML that can be read: {error}") from None
    for name in _BOILERPLATE:
        for element in list(tree.iter(name)):
            if element.getparent() is not None:
                element.drop_tree()
    whole = tree.find(".//main")
    return list(_walk(tree if whole is None else whole))


def _walk(tree: Any) -> Iterator[Block]:
    """Blocks in document order: text gathers until an element begins or ends that stands in lines of its own."""
    gathered: list[str] = []
    level = 0
    for event, element in etree.iterwalk(tree, events=("start", "end")):
        name = element.tag if isinstance(element.tag, str) else ""
        if name in _BLOCKS or name in _HEADINGS:
            yield from _flush(gathered, level, element.sourceline or 1)
            level = _HEADINGS.get(name, 0) if event == "start" else 0
        elif name == "br" and event == "start":
            gathered.append("\n")
        gathered.append((element.text if event == "start" else element.tail) or "")
    yield from _flush(gathered, level, 1)


def _flush(gathered: list[str], level: int, line: int) -> Iterator[Block]:
    lines = (" ".join(each.split()) for each in "".join(gathered).split("\n"))
    whole = "\n".join(each for each in lines if each)
    gathered.clear()
    if whole:
        yield Block("heading", whole.replace("\n", " "), line, level) if level else Block("text", whole, line)
