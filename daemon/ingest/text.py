"""Reading text strictly and in bounded memory: UTF-8 only, a byte-order mark stripped once, binary refused."""

import codecs
import re
from collections.abc import Iterator

from daemon.ingest.opened import blocks
from daemon.ingest.problem import Problem

CONTROL_SHARE_MAX = 0.001
_CONTROLS = bytes(code for code in (*range(32), 127) if code not in (9, 10, 12, 13))
_MAGIC: list[tuple[bytes, str]] = [
    (b"%PDF-", "a PDF"), (b"PK\x03\x04", "a ZIP archive (docx, epub, ...)"), (b"\x1f\x8b", "gzip-compressed"),
    (b"\x28\xb5\x2f\xfd", "zstandard-compressed"), (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x7fELF", "a program"), (b"SQLite format 3\x00", "a database"),
    (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"), (b"\x80\x04\x95", "a pickle"),
]  # fmt: skip


def check(descriptor: int) -> None:
    """Read a whole file once; raises `Problem` unless it is clean UTF-8 text."""
    size = controls = 0
    decoder = Utf8()
    for block in blocks(descriptor):
        if size == 0:
            check_magic(block)
        check_no_nul(block, size)
        controls += len(block) - len(block.translate(None, _CONTROLS))
        decoder.decode(block)
        size += len(block)
    decoder.finish()
    if controls > CONTROL_SHARE_MAX * size:
        raise Problem("binary", f"{controls} of {size} bytes are control characters: no text file", stage="read")


def check_no_nul(block: bytes, offset: int = 0) -> None:
    """Raise `Problem` when a NUL byte stands in a block that begins at `offset`."""
    zero = block.find(b"\0")
    if zero >= 0:
        at = offset + zero
        raise Problem("binary", f"NUL at byte {at}: this is no text file", byte_offset=at, stage="read")


def check_magic(block: bytes) -> None:
    """Raise `Problem` when the first bytes of a file are those of a format that is no text."""
    for magic, what in _MAGIC:
        if block.startswith(magic):
            advice = "save it as UTF-8" if what == "UTF-16" else "give it the extension of what it is"
            raise Problem("binary", f"the content is {what}, not UTF-8 text: {advice}", byte_offset=0, stage="read")


class Utf8:
    """Decodes block by block; a character may lie across two blocks. Errors carry the byte offset in the file."""

    def __init__(self) -> None:
        self._rest, self._position = b"", 0

    def decode(self, block: bytes) -> str:
        """The text of the next block, without the byte-order mark of the first."""
        return self._decode(block, final=False)

    def finish(self) -> None:
        """The file ends here; raises `Problem` when it ends within a character."""
        self._decode(b"", final=True)

    def _decode(self, block: bytes, *, final: bool) -> str:
        data = self._rest + block
        try:
            text, used = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            at = self._position + error.start
            raise Problem(
                "invalid_utf8", f"byte {at} (0x{data[error.start]:02x}) is not UTF-8: save the file as UTF-8",
                byte_offset=at, stage="read",
            ) from None  # fmt: skip
        start = self._position == 0 and used > 0
        self._rest, self._position = data[used:], self._position + used
        return text.removeprefix("\ufeff") if start else text


def read_paragraphs(descriptor: int, characters_max: int) -> Iterator[tuple[str, int]]:
    """(paragraph, its first line) of a checked file; a longer one than `characters_max` comes in several pieces."""
    held, line = "", 1
    for text in texts(descriptor):
        held += text
        *whole, held = _BREAK.split(held) if len(held) > characters_max else [held]
        for index in range(0, len(whole), 2):
            yield from _pieces(whole[index], line, characters_max)
            line += whole[index].count("\n") + whole[index + 1].count("\n")
        while len(held) > characters_max:
            cut = _cut(held, characters_max)
            yield held[:cut], line
            line += held.count("\n", 0, cut)
            held = held[cut:]
    for index, part in enumerate(_BREAK.split(held)):
        if index % 2 == 0:
            yield from _pieces(part, line, characters_max)
        line += part.count("\n")


_BREAK = re.compile(r"(\n(?:[ \t]*\n)+)")


def _pieces(paragraph: str, line: int, characters_max: int) -> Iterator[tuple[str, int]]:
    while len(paragraph) > characters_max:
        cut = _cut(paragraph, characters_max)
        yield paragraph[:cut], line
        line += paragraph.count("\n", 0, cut)
        paragraph = paragraph[cut:]
    if paragraph.strip():
        yield paragraph, line


def _cut(text: str, limit: int) -> int:
    """Where to cut a text without paragraphs: after a line, else a word, else anywhere."""
    for separator in ("\n", " "):
        at = text.rfind(separator, limit // 2, limit)
        if at >= 0:
            return at + 1
    return limit


def texts(descriptor: int) -> Iterator[str]:
    r"""The text of a checked file, block by block, with `\n` line ends (a `\r\n` may lie across two blocks)."""
    decoder, held = Utf8(), ""
    for block in blocks(descriptor):
        text = held + decoder.decode(block)
        held = "\r" if text.endswith("\r") else ""
        yield text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n")
    if held:
        yield "\n"
