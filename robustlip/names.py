"""Names and texts from files that are shown to users: invisible characters are refused, or shown as escapes."""

from __future__ import annotations

import unicodedata
from typing import Any

from robustlip.errors import BadInput

# Control, format (zero width, bidirectional, soft hyphen, tags), surrogate, private use, unassigned, line and paragraph separators.
_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
# Letters and marks without a glyph: grapheme joiner, Hangul fillers, Khmer vowels, Mongolian and other variation selectors, blank Braille.
_UNSEEN = frozenset((0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0))


def is_invisible(character: str) -> bool:
    """Whether a character has no visible glyph, or moves other characters. A space counts as visible."""
    code = ord(character)
    return unicodedata.category(character) in _CATEGORIES or code in _UNSEEN or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF


def invisible_in(text: str, lines: bool = False) -> str:
    """The first invisible character of a text, as 'U+200B', or ''. lines: line ends and tabs are allowed."""
    return next((f"U+{ord(c):04X}" for c in text if is_invisible(c) and not (lines and c in "\n\r\t")), "")


def shown(text: str, limit: int = 200) -> str:
    """The text for a message or a table: cut to `limit` characters, invisible characters as escapes."""
    return "".join(c.encode("unicode_escape").decode("ascii") if is_invisible(c) else c for c in text[:limit])


def check_line(text: str) -> str:
    """Returns the text. Raises ValueError if it contains an invisible character; for pydantic."""
    if found := invisible_in(text):
        raise ValueError(f"expected visible characters, got {found} in {shown(text, 60)!r}; remove it")
    return text


def check_table(table: Any, what: str) -> None:
    """Raises BadInput for an invisible character in a key or text of a TOML or JSON table. Texts may have line ends; a vocabulary is not checked."""
    left = [table]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            for key, entry in value.items():
                _check(str(key), what, lines=False)
                if key != "vocabulary":
                    left.append(entry)
        elif isinstance(value, list | tuple):
            left.extend(value)
        elif isinstance(value, str):
            _check(value, what, lines=True)


def _check(text: str, what: str, *, lines: bool) -> None:
    if found := invisible_in(text, lines):
        raise BadInput(f"expected visible characters in {what}, got {found} in {shown(text, 60)!r}; remove it")
