"""What a caption says, as text: words that it must not hold or has to, loops, sentences, its length. Needs no torch."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from vlm_lora.inference.metrics.tokens import LONE

WORD = re.compile(rf"[{LONE}]|(?:(?![{LONE}])\w)+(?:['\u2019-](?:(?![{LONE}])\w)+)*")
"""A word; of what is written without spaces a character."""
LOOP_TIMES, LOOP_WORDS = 3, 8
"""What is said so often in a row is a loop, if it comes to that many words and marks."""
LONGEST_LOOP = 40
"""Words and marks after which a loop comes round at most."""

_ITEM = re.compile(rf"{WORD.pattern}|[^\w\s]")
_SENTENCE = re.compile(
    r"(?<![A-Z])(?<!\b(?:Mr|Ms|Dr|St|vs))(?<!\b(?:Mrs|etc))[.!?\u2026]+[\"')\]\u201d\u2019\u00bb]*(?=\s|$)"
    r"|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d]*"
)
"""The end of a sentence, with the quotes and brackets that close after it."""


def folded(text: str) -> str:
    """The text as words are compared: upper and lower case alike, letters and their accents put together, spaces
    plain."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text).casefold().replace("\u2019", "'"))


def joins(char: str) -> bool:
    """Whether it makes one word with a letter beside it; characters that are written without spaces do not."""
    return re.match(rf"(?![{LONE}])\w", char) is not None


@lru_cache(maxsize=4096)
def _pattern(word: str) -> re.Pattern[str]:
    word = folded(word.strip())
    before, after = (rf"(?<![^\W{LONE}])" if joins(word[0]) else ""), (rf"(?![^\W{LONE}])" if joins(word[-1]) else "")
    return re.compile(before + re.escape(word) + after)


def says(text: str, words: Sequence[str]) -> list[str]:
    """Which of the words or phrases the text holds as whole words, in whatever case, accents and spaces."""
    text = folded(text)
    return [word for word in words if _pattern(word).search(text)]


def num_words(text: str) -> int:
    return sum(1 for _ in WORD.finditer(text))


def first_words(text: str, count: int) -> str:
    """The text up to the end of its word of that number, with the mark that ends a sentence right after it."""
    for number, match in enumerate(WORD.finditer(text), start=1):
        if number == count:
            ended = _SENTENCE.match(text, match.end())
            return text[: ended.end() if ended else match.end()]
    return text


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; all of it where no sentence ends."""
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return text[: ends[-1]] if ends else text


def without_loop(text: str) -> str:
    """The text up to where it begins to say the same again and again; all of it where it does not."""
    items = [(match[0].casefold(), match.end()) for match in _ITEM.finditer(text)]
    same = [0] * (LONGEST_LOOP + 1)  # by period: how many items before this one equal the one a period earlier
    for i, (item, _) in enumerate(items):
        for period in range(1, min(i, LONGEST_LOOP) + 1):
            same[period] = same[period] + 1 if items[i - period][0] == item else 0
            # `same` repeats, after the period that they repeat
            if same[period] + period >= max(LOOP_TIMES * period, LOOP_WORDS) and same[period] >= 2 * period:
                return text[: items[i - same[period]][1]].rstrip(" ,;:\u3001\uff0c")
    return text
