"""Words or characters: what the metrics compare."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

Level = Literal["word", "char"]

TOKENIZER_ID: dict[Level, str] = {"word": "vlm-lora-ptb-1", "char": "vlm-lora-char-1"}
"""For reports: scores depend on it."""
LONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Han, as a range of a pattern

_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "`": "'", "\u2026": " ", "\ufe0f": None})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_W = r"[^\s!-/:-@\[-^`{-~]"  # part of a word: neither space nor ASCII punctuation, except "_"
_TOKEN = re.compile(
    rf"(?:mr|mrs|ms|dr|st|ave|blvd|etc|vs|jr|sr|inc|co|ft|mt)\.(?!{_W})"  # abbreviations keep their full stop
    r"|no\.(?=\s*\d)"
    rf"|(?:[^\W\d_]\.)+(?!{_W})"  # u.s.  a.m.  plan b.
    rf"|n't(?!{_W})|'(?:s|re|ve|ll|d|m|em|\d0s)(?!{_W})|'n'|y'(?=all)|ma'am|o'{_W}+"
    rf"|{_W}+(?:(?:[-./&]|(?<=\d)[,:](?=\d)){_W}+)*"  # black-and-white  and/or  3.5  1,000  10:30
    r"|[()\[\]{}$%&#*@+=<>/|~^\\]"
)
_SPLIT = re.compile(  # the empty places inside "isn't", "cannot", "gonna" where one word becomes two tokens
    rf"(?=n't(?!{_W}))|(?<=\bcan)(?=not\b)|(?<=\bgon)(?=na\b)|(?<=\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)"
    r"|(?<=\bgim)(?=me\b)|(?<=\blem)(?=me\b)"
)


def tokenize(text: str, level: Level = "word") -> list[str]:
    """Split into lower-case tokens without punctuation.

    ``word`` follows the Penn Treebank tokenizer that COCO captions are scored with (the Java program behind
    pycocoevalcap's ``PTBTokenizer``): contractions are split ("is n't", "man 's"); hyphenated words, numbers
    and abbreviations stay whole; sentence punctuation and quotes go; brackets become "-lrb-", "-rrb-".
    The tokens are the same for ordinary English captions, not for addresses, smileys, "?!" or
    currencies other than "$".

    ``char`` yields one token per character, for languages written without spaces (Chinese, Japanese):
    letters, marks and digits only, after Unicode NFKC, so that full-width digits equal plain ones.
    """
    if level == "char":
        return [char for char in unicodedata.normalize("NFKC", text).lower() if _category(char) in "LMN"]
    if level != "word":
        raise ValueError(f'level must be "word" or "char", not {level!r}')
    text = unicodedata.normalize("NFC", text).lower().translate(_QUOTES)
    if not text.isascii():
        text = "".join(char if char.isascii() or _category(char) not in "PS" else " " for char in text)
    tokens: list[str] = _TOKEN.findall(_SPLIT.sub(" ", text))
    return [_BRACKETS.get(token, token) for token in tokens]


def level_for(texts: Iterable[str]) -> Level:
    """``char`` where most letters are Chinese or Japanese, which are written without spaces, else ``word``."""
    letters = [char for text in texts for char in text if char.isalpha()]
    lone = sum(re.match(f"[{LONE}]", char) is not None for char in letters)
    return "char" if 2 * lone > len(letters) else "word"


def _category(char: str) -> str:
    """The Unicode category's first letter: L letter, M mark, N number, P punctuation, S symbol, Z space."""
    return unicodedata.category(char)[0]
