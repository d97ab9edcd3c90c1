"""In which scripts and languages texts are: the first is exact, the second a guess that says where it has none."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache

WORDS = {
    "english": "a an and are at for from has he his in is it of on that the there this to two with",
    "german": "auf das dem den der des die ein eine einem einen einer es im in ist mit nicht sind und von vor zu zwei",
    "french": "au aux avec ce dans de des deux du elle est et il la le les ont par pour qui sur un une",
    "spanish": "al con de del dos el en es esta está hay la las los para por que se su un una y",
    "portuguese": "ao as com da das de dois do dos e em está há na no não os para por que se um uma",
    "italian": "al che con da dal del della delle di due e gli i il in la le nel non per su sul un una è",
    "dutch": "aan bij de dat een en er het in is met naar niet of op te twee van voor zijn",
    "polish": "dla do i jest na nie od po się są to w z za ze",
    "turkish": "bir bu çok da de ile için ve olan üzerinde var",
    "vietnamese": "bên các của có đang hai là một người những trên trong và với",
    "indonesian": "ada dan dari dengan di dua ini itu ke orang pada sebuah seorang untuk yang",
    "swedish": "att av den det en ett finns för i inte med och på som till två är",
}
"""What a caption in one of these languages hardly goes without; some are words of several."""
LANGUAGES_OF = {
    word: [name for name, words in WORDS.items() if word in words.split()] for word in " ".join(WORDS.values()).split()
}
_LATIN = re.compile("[a-z]")
_WORD = re.compile(r"[^\W\d_]+")


def languages(texts: Iterable[str]) -> dict[str, float]:
    """Share of the texts with Latin letters by language, the commonest first.

    That of which a text has most of WORDS; "undecided" where it has none of them, or as many of two languages.
    """
    found: Counter = Counter()
    for text, times in Counter(texts).items():
        text = unicodedata.normalize("NFC", text).lower()
        if not _LATIN.search(text):
            continue
        votes = Counter(name for word in _WORD.findall(text) for name in LANGUAGES_OF.get(word, ()))
        most = max(votes.values(), default=0)
        best = [name for name in votes if votes[name] == most]
        found[best[0] if len(best) == 1 else "undecided"] += times
    return _shares(found)


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """Share of the letters by Unicode script ("latin", "cyrillic", "cjk"), the commonest first."""
    letters: Counter = Counter()
    for text in texts:
        letters.update(text)
    found: Counter = Counter()
    for letter, times in letters.items():
        if script := _script(letter):
            found[script] += times
    return _shares(found)


def _shares(found: Counter) -> dict[str, float]:
    return {name: round(times / found.total(), 4) for name, times in found.most_common()}


@cache
def _script(letter: str) -> str | None:
    # The standard library has no table of scripts; the first word of a letter's name is one
    return unicodedata.name(letter, "other").split()[0].split("-")[0].lower() if letter.isalpha() else None
