"""Scores of short answers against the accepted ones."""

import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from vlm_lora.inference.metrics.captions import check_texts

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBER_WORDS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {  # "dont" -> "don't"; where there are two, either or both may be missing
    loose: full
    for full in _CONTRACTIONS.split()
    for loose in (full.replace("'", ""), full.replace("'", "", 1), "".join(full.rsplit("'", 1)))
}


def normalize_answer(answer: str) -> str:
    """An answer as the VQAv2 evaluation compares it (Goyal et al. 2017, visualqa.org/evaluation).

    Lower case; punctuation dropped where it stands next to a space or the answer has a comma between digits,
    else a space ("t-shirt" is "t shirt", "1,000" is "1000"); full stops dropped unless a digit follows;
    "none" and "zero" to "ten" as digits; no articles; forgotten apostrophes put back ("dont" is "don't").
    One difference: an answer of articles only, such as the choice "A", stays instead of becoming empty.
    """
    answer = _without_punctuation(re.sub(r"[\n\t]", " ", answer).strip())
    words = [_NUMBER_WORDS.get(word, word) for word in answer.lower().split()]
    kept = [word for word in words if word not in ("a", "an", "the")] or words
    return " ".join(_APOSTROPHES.get(word, word) for word in kept)


def _without_punctuation(original: str) -> str:
    answer, has_digit_comma = original, re.search(r"\d,\d", original) is not None
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = f"{mark} " in original or f" {mark}" in original
        answer = answer.replace(mark, "" if beside_space or has_digit_comma else " ")
    return re.sub(r"\.(?!\d)", "", answer)


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """VQA accuracy of one answer, 0 to 1 (Antol et al. 2015, "VQA: Visual Question Answering").

    The mean, over leaving out each human in turn, of min(matches among the others / 3, 1). As in the official
    code (vqaEval.py), the model's answer is normalised whole, but of the humans' only the punctuation goes, and
    that only where they are not all alike: VQAv2's come in lower case, with digits and without articles. So ten
    humans who say "three" are met by no answer, as "three" of the model is "3". The formula is made for ten
    humans: with two of them the most one can reach is 1/3, with three 2/3.

    One difference: a single human answer, of which leaving one out leaves nobody, is no VQA data. It is
    normalised as the model's is, and a match is 1.0, else 0.0.
    """
    check_texts(human_answers, "human_answers")
    given = normalize_answer(answer)
    if len(human_answers) == 1:
        return float(normalize_answer(human_answers[0]) == given)
    alike = len(set(human_answers)) == 1
    matches = [(human if alike else _without_punctuation(human)) == given for human in human_answers]
    total = sum(matches)
    return sum(min((total - matched) / 3, 1.0) for matched in matches) / len(matches)


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1.0 if the answer equals an accepted one, else 0.0.

    Ignored on both sides: case, Unicode composition (NFC), white space at either end, and one full stop at
    the end ("." or the ideographic one). Anything else counts: inner spaces, articles, other punctuation.
    """
    check_texts(accepted, "accepted")
    return float(plain(answer) in map(plain, accepted))


def plain(text: str) -> str:
    """What of an answer is compared by `exact_match`."""
    return re.sub(r"[.\u3002]\Z", "", unicodedata.normalize("NFC", text).casefold().strip()).rstrip()


def anls(answer: str, accepted: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest accepted answer, 0 to 1; its mean is ANLS.

    Biten et al. 2019, "Scene Text Visual Question Answering": 1 - edits / length of the longer text, or 0
    where edits / length reaches ``threshold``. Case and runs of white space are ignored.
    """
    check_texts(accepted, "accepted")
    best = 0.0
    given = " ".join(answer.lower().split())
    for text in (" ".join(other.lower().split()) for other in accepted):
        distance = Levenshtein.normalized_distance(given, text)
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best
