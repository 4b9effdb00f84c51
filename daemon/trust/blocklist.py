"""What an operator never wants to be learned from players: a file of words, patterns and subjects.

One entry a line: `h:...` is a subject, `/.../` a regular expression, anything else a word or several, found as whole
words in any case. `#` begins a comment. The file is read again whenever it changes; while it has an error in it, no
feedback is taken in, and the log says why.
"""

import re
from functools import lru_cache
from pathlib import Path

import msgspec

BYTES_MAX = 1024 * 1024


class BadBlocklist(Exception):
    """The file cannot be used; the message says which line and why."""


class Blocklist(msgspec.Struct, frozen=True):
    """What is blocked."""

    subjects: frozenset[str] = frozenset()
    words: re.Pattern[str] | None = None

    def why(self, subject: str, texts: list[str]) -> str:
        """Which entry stands against a record, or an empty string."""
        if subject in self.subjects:
            return "its subject is on the blocklist"
        for text in texts if self.words is not None else []:
            found = self.words.search(text) if self.words is not None else None
            if found is not None:
                return f"it holds {found[0][:64]!r}, which is on the blocklist"
        return ""


def load(path: Path | None) -> Blocklist:
    """The list as the file has it now; empty without a file. Raises `BadBlocklist`."""
    if path is None:
        return Blocklist()
    try:
        seen = path.stat()
        return _load(path, seen.st_mtime_ns, seen.st_size, seen.st_ino)
    except (OSError, UnicodeDecodeError) as error:
        raise BadBlocklist(f"{path} (trust.blocklist_file) cannot be read: {error}") from None


@lru_cache(maxsize=4)
def _load(path: Path, _changed_ns: int, size: int, _inode: int) -> Blocklist:
    if size > BYTES_MAX:
        raise BadBlocklist(f"{path}: {size} bytes; at most {BYTES_MAX} are read")
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    entries = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    subjects = frozenset(line for _, line in entries if line.startswith("h:"))
    patterns = [_pattern(path, number, line) for number, line in entries if not line.startswith("h:")]
    return Blocklist(subjects, re.compile("|".join(patterns), re.IGNORECASE) if patterns else None)


def _pattern(path: Path, number: int, line: str) -> str:
    if not (len(line) > 2 and line.startswith("/") and line.endswith("/")):
        words = r"\s+".join(map(re.escape, line.split()))
        return rf"(?<!\w){words}(?!\w)"
    try:
        re.compile(line[1:-1])
    except re.error as error:
        raise BadBlocklist(f"{path}, line {number}: {line} is no regular expression: {error}") from None
    return f"(?:{line[1:-1]})"
