"""Cleaning of texts, explicit and minimal: what a person would not see anyway. No word is touched."""

import re
import unicodedata

# Not U+200C to U+200F and the like (category Cf): they join emoji and shape Persian and Hindi words.
_CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_VISIBLE = re.compile(rf"[^\s{_CONTROLS}]")
_LINE_END = re.compile(r"\r\n?|\x85|\u2028|\u2029")
_SPACES = re.compile(r"[^\S\n]+")


def is_blank(text: str) -> bool:
    """Whether cleaning leaves nothing of the text."""
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
    return plain, tuple(reasons)
