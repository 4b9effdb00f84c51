"""Names in the drop directory: which are ignored, and how any of them is written down."""

import re
from collections.abc import Iterable
from fnmatch import translate

from pathspec import GitIgnoreSpec

OWN = ("done", "quarantine")
"""Directories that the daemon writes to itself."""
IGNORE_FILE = ".eternadignore"
_PATTERNS = (
    ".*", "*~", "~$*", "#*#", "*.swp", "*.swx", "*.tmp", "*.temp", "*.part", "*.partial", "*.crdownload", "*.download",
    "*.filepart", "*.bak", "*.orig", "*.lock", "*.unconfirmed*", "Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir",
    "*sync-conflict*", "*.meta.json",
)  # fmt: skip
"""Dotfiles (`.git` among them), and what editors, browsers and sync tools write for a moment."""
_TEMPORARY = re.compile("|".join(map(translate, _PATTERNS)))


class Ignored:
    """Decides which names below the library directory are none of ours; `.eternadignore` is read as `.gitignore` is."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.set_rules(lines)

    def set_rules(self, lines: Iterable[str]) -> None:
        """Use these lines of `.eternadignore` from now on."""
        self._rules = GitIgnoreSpec.from_lines(lines)
        self._has_rules = any(pattern.include is not None for pattern in self._rules.patterns)

    def __call__(self, relative: str) -> bool:
        """Whether a path is ignored, because of itself or of a directory above it."""
        return any(self.is_temporary(part) for part in relative.split("/")) or self.is_excluded(relative)

    def is_excluded(self, relative: str) -> bool:
        """Whether a path lies in a directory of our own, or `.eternadignore` names it."""
        if relative.startswith(OWN):
            return relative.partition("/")[0] in OWN
        return self._has_rules and self._rules.match_file(relative)

    @staticmethod
    def is_temporary(name: str) -> bool:
        """Whether a name is one that is only there for a moment."""
        return _TEMPORARY.match(name) is not None


def printable(name: str) -> str:
    r"""A file name as text that any log, page and database takes: `\x0a` for bytes that are none, reversible.

    Control and direction characters, undecodable bytes and the backslash itself are written as escapes; distinct names
    stay distinct (so do the two Unicode forms of one accented name).
    """
    if name.isascii() and name.isprintable() and "\\" not in name:
        return name
    return "".join(_escaped(character) for character in name)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode gives it
        return f"\\x{code - 0xDC00:02x}"
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def real_name(written: str) -> str:
    """The inverse of `printable`: the name as `os.fsdecode` gives it."""
    return _ESCAPE.sub(_unescaped, written)


_ESCAPE = re.compile(r"\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


def _unescaped(found: re.Match[str]) -> str:
    escape = found[1]
    if escape == "\\":
        return escape
    return chr(int(escape[1:], 16) + (0xDC00 if escape[0] == "x" else 0))
