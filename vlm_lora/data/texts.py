"""Cleaning of texts, explicit and minimal: what a person would not see anyway. No word is touched."""

import re
import unicodedata
from contextlib import suppress

_CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff"
_CONTROL = re.compile(f"[{_CONTROLS}]")
# What shows nothing of itself (Unicode's Default_Ignorable_Code_Point, and the empty Braille cell). It stays within
# a text: U+200C, U+200D and the like join emoji and shape Persian and Hindi words.
_INVISIBLE = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800"
    r"\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_VISIBLE = re.compile(rf"[^\s{_CONTROLS}{_INVISIBLE}]")
_LINE_END = re.compile(r"\r\n?|\x85|\u2028|\u2029")
_TYPED = "\u2018\u2019\u201c\u201d\u201e\u2013\u2014\u2026\u2022\u20ac\u00a0\u00a3\u00a9\u00ab\u00ae\u00b0\u00bb\u00d7"
"""What people type that is no letter and no ASCII."""
_SPACES = re.compile(r"[^\S\n]+")


def windows_hint(data: bytes | str) -> str:
    """Of what is no UTF-8: that it is Windows' own encoding, where its letters make sense there; else "".

    In a text, each byte that is no UTF-8 is a surrogate.
    """
    with suppress(UnicodeError):
        data = data if isinstance(data, bytes) else data.encode("ascii", "surrogateescape")
        text = data.decode("cp1252")
        word = next((word for word in text.split() if not word.isascii()), "").strip(",;:.!?\"'()[]{}|")
        if word and all(letter.isascii() or letter.isalpha() or letter in _TYPED for letter in text):
            return f" (as Windows-1252, which Excel and Notepad write, it says {word[:40]!r})"
    return ""


def is_blank(text: str) -> bool:
    """Whether a person would see nothing of the text; cleaning leaves nothing of it."""
    return _VISIBLE.search(text) is None


def clean_text(text: str) -> tuple[str, tuple[str, ...]]:
    """The text in NFC, without control characters, with plain white space; and which of the three changed it.

    White space: line ends become newlines, each run of other white space one space, none stays at the ends of
    a line or of the text. Cleaning twice is cleaning once.
    """
    reasons = []
    composed = unicodedata.normalize("NFC", text)
    if composed != text:
        reasons.append("nfc")
    visible = _CONTROL.sub("", composed)
    if visible != composed:
        reasons.append("control characters")
        visible = unicodedata.normalize("NFC", visible)  # a letter and its accent may have become neighbours
    lines = (_SPACES.sub(" ", line).strip() for line in _LINE_END.sub("\n", visible).split("\n"))
    plain = "\n".join(lines).strip("\n")
    if plain != visible:
        reasons.append("white space")
    if plain and is_blank(plain):
        return "", ("invisible characters",)
    return plain, tuple(reasons)
