"""Scores for captions and answers: strings in, numbers out.

Every score is a fraction (0 to 1, not percent), except CIDEr-D, which runs from 0 to 10 as published.
Scores come per sample where the metric allows it, so that a caller can put an interval on a mean or compare
two models on the same samples. Standard library only. All functions raise ``ValueError`` for an empty corpus,
lists of unequal length, a sample without a reference, or one string where a list of strings is meant.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, NamedTuple

Level = Literal["word", "char"]
References = Sequence[Sequence[str]]  # per sample, at least one
BleuStats = tuple[int, ...]  # candidate length, reference length, 4 match counts, 4 n-gram counts

MAX_ORDER = 4  # n-grams of 1 to 4 tokens, in CIDEr-D and BLEU alike
TOKENIZER_ID = {"word": "vlm-lora-ptb-1", "char": "vlm-lora-char-1"}  # for reports: scores depend on it

LONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Han, as a range of a pattern

# --- tokens

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
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(_SPLIT.sub(" ", text))]


def level_for(texts: Iterable[str]) -> Level:
    """``char`` where most letters are Chinese or Japanese, which are written without spaces, else ``word``."""
    letters = [char for text in texts for char in text if char.isalpha()]
    lone = sum(re.match(f"[{LONE}]", char) is not None for char in letters)
    return "char" if 2 * lone > len(letters) else "word"


def _category(char: str) -> str:
    """The Unicode category's first letter: L letter, M mark, N number, P punctuation, S symbol, Z space."""
    return unicodedata.category(char)[0]


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    orders = range(1, MAX_ORDER + 1)
    return Counter(tuple(tokens[i : i + n]) for n in orders for i in range(len(tokens) - n + 1))


def _check_corpus(candidates: Sequence[str], references: References) -> None:
    if isinstance(candidates, str) or not candidates or len(candidates) != len(references):
        raise ValueError(f"expected one list of references per candidate: {len(candidates)}, {len(references)}")
    for index, texts in enumerate(references):
        _check_texts(texts, f"references of sample {index}")


def _check_texts(texts: Sequence[str], name: str) -> None:
    if isinstance(texts, str) or not texts:
        raise ValueError(f"{name}: expected a list of at least one string, got {texts!r}")


# --- captions


def cider_d(candidates: Sequence[str], references: References, *, level: Level = "word") -> list[float]:
    """CIDEr-D of each image, 0 to 10; its mean is the corpus score. Tables often show it times 100.

    Vedantam, Zitnick, Parikh 2015, "CIDEr: Consensus-based Image Description Evaluation", the D variant:
    tf-idf weighted n-grams of 1 to 4 words, counts clipped to the reference, a Gaussian penalty (sigma 6) on
    the difference in length, no stemming. Document frequencies come from the references given here, one
    document per image, so scores on different images do not compare, and those on few images are rough.
    With a single image every n-gram occurs in every document, its weight is log(1) and the score is 0.
    """
    _check_corpus(candidates, references)
    counted = [[_ngrams(tokenize(text, level)) for text in texts] for texts in references]
    frequency = Counter(ngram for counts in counted for ngram in set().union(*counts))
    log_images = math.log(len(references))

    def weigh(counts: Counter[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        """tf-idf per n-gram, their Euclidean norm per order, length in words."""
        weights = {g: count * (log_images - math.log(max(1, frequency[g]))) for g, count in counts.items()}
        squares = [0.0] * MAX_ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        length = sum(count for ngram, count in counts.items() if len(ngram) == 1)
        return weights, [math.sqrt(square) for square in squares], length

    scores = []
    for candidate, reference_counts in zip(candidates, counted, strict=True):
        weights, norms, length = weigh(_ngrams(tokenize(candidate, level)))
        total = 0.0
        for counts in reference_counts:
            other_weights, other_norms, other_length = weigh(counts)
            dots = [0.0] * MAX_ORDER
            for ngram, weight in weights.items():
                other = other_weights.get(ngram, 0.0)
                dots[len(ngram) - 1] += min(weight, other) * other
            cosines = (d / (a * b) for d, a, b in zip(dots, norms, other_norms, strict=True) if a and b)
            total += sum(cosines) / MAX_ORDER * math.exp(-((length - other_length) ** 2) / (2 * 6.0**2))
        scores.append(10.0 * total / len(reference_counts))
    return scores


def bleu_stats(candidate: str, references: Sequence[str], *, level: Level = "word") -> BleuStats:
    """The ten counts of one sample that corpus BLEU is made of; they add up over samples.

    Returns the candidate's length, the length of the reference closest to it (the shorter one of two equally
    close), the clipped matches of 1- to 4-grams, the number of 1- to 4-grams; all in tokens.
    """
    _check_texts(references, "references")
    tokens = tokenize(candidate, level)
    reference_tokens = [tokenize(text, level) for text in references]
    closest = min((abs(len(other) - len(tokens)), len(other)) for other in reference_tokens)[1]
    allowed: Counter[tuple[str, ...]] = Counter()
    for other in reference_tokens:
        allowed |= _ngrams(other)
    matches, totals = [0] * MAX_ORDER, [0] * MAX_ORDER
    for ngram, count in _ngrams(tokens).items():
        matches[len(ngram) - 1] += min(count, allowed[ngram])
        totals[len(ngram) - 1] += count
    return (len(tokens), closest, *matches, *totals)


def bleu_from_stats(stats: Iterable[Sequence[float]]) -> list[float]:
    """Corpus BLEU-1, -2, -3, -4 from `bleu_stats` of its samples, or from their column sums as one row.

    No smoothing: where no n-gram of some order matched, BLEU of that order and above is 0.
    """
    sums = [sum(column) for column in zip(*stats, strict=True)]
    if not sums:
        raise ValueError("BLEU of no samples")
    length, closest, matches, totals = sums[0], sums[1], sums[2 : 2 + MAX_ORDER], sums[2 + MAX_ORDER :]
    brevity = 1.0 if length >= closest else math.exp(1 - closest / length) if length else 0.0
    scores, log_sum = [], 0.0
    for order, (matched, total) in enumerate(zip(matches, totals, strict=True), start=1):
        log_sum += math.log(matched / total) if matched else -math.inf
        scores.append(brevity * math.exp(log_sum / order))
    return scores


def bleu(candidates: Sequence[str], references: References, *, level: Level = "word") -> list[float]:
    """Corpus BLEU-1, -2, -3, -4, each 0 to 1.

    Papineni, Roukos, Ward, Zhu 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation", with
    the brevity penalty against the closest reference length, as COCO's server computes it.
    """
    _check_corpus(candidates, references)
    pairs = zip(candidates, references, strict=True)
    return bleu_from_stats([bleu_stats(candidate, texts, level=level) for candidate, texts in pairs])


def rouge_l(candidates: Sequence[str], references: References, *, level: Level = "word") -> list[float]:
    """ROUGE-L of each sample, 0 to 1; its mean is the corpus score.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries": F-measure (beta 1.2) of the longest
    common subsequence. As in COCO's evaluation, best precision and recall may be of different references.
    """
    _check_corpus(candidates, references)
    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        tokens = tokenize(candidate, level)
        precision = recall = 0.0
        for other in (tokenize(text, level) for text in texts):
            common = _common_subsequence(tokens, other)
            if common:
                precision, recall = max(precision, common / len(tokens)), max(recall, common / len(other))
        both = recall + 1.2**2 * precision
        scores.append((1 + 1.2**2) * precision * recall / both if both else 0.0)
    return scores


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest one, a row of the table in one integer: Hyyrö 2004."""
    places: dict[str, int] = {}
    for i, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << i
    everything = free = (1 << len(left)) - 1
    for token in right:
        met = free & places.get(token, 0)
        free = (free + met | free - met) & everything
    return len(left) - free.bit_count()


def mean_length(captions: Sequence[str], *, level: Level = "word") -> float:
    """Mean number of tokens per caption."""
    _check_texts(captions, "captions")
    return sum(len(tokenize(caption, level)) for caption in captions) / len(captions)


def distinct_share(captions: Sequence[str], *, level: Level = "word") -> float:
    """Distinct captions (compared as tokens) / captions; near 0: a model that always says the same."""
    _check_texts(captions, "captions")
    return len({tuple(tokenize(caption, level)) for caption in captions}) / len(captions)


def repetition(caption: str, *, level: Level = "word") -> float:
    """The share of a caption's 4-grams that repeat an earlier one of it: 0 none, near 1 a loop."""
    ngrams = [ngram for ngram in _ngrams(tokenize(caption, level)).elements() if len(ngram) == MAX_ORDER]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


# --- answers

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
    _check_texts(human_answers, "human_answers")
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
    _check_texts(accepted, "accepted")
    return float(_plain(answer) in map(_plain, accepted))


def _plain(text: str) -> str:
    return re.sub(r"[.\u3002]\Z", "", unicodedata.normalize("NFC", text).casefold().strip()).rstrip()


def anls(answer: str, accepted: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest accepted answer, 0 to 1; its mean is ANLS.

    Biten et al. 2019, "Scene Text Visual Question Answering": 1 - edits / length of the longer text, or 0
    where edits / length reaches ``threshold``. Case and runs of white space are ignored.
    """
    _check_texts(accepted, "accepted")
    best = 0.0
    given = " ".join(answer.lower().split())
    for text in (" ".join(other.lower().split()) for other in accepted):
        distance = _edits(given, text) / max(len(given), len(text), 1)
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def _edits(left: str, right: str) -> int:
    """Levenshtein distance, a whole column of its table in one integer: Myers 1999, as Hyyrö 2003 writes it."""
    if not left:
        return len(right)
    places: dict[str, int] = {}
    for i, char in enumerate(left):
        places[char] = places.get(char, 0) | 1 << i
    everything, last = (1 << len(left)) - 1, 1 << (len(left) - 1)
    rises, falls, edits = everything, 0, len(left)  # bits where the column goes up or down by one
    for char in right:
        equal = places.get(char, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        across_up, across_down = falls | ~(diagonal | rises) & everything, rises & diagonal
        edits += bool(across_up & last) - bool(across_down & last)
        across_up = across_up << 1 | 1
        rises = (across_down << 1 | ~(diagonal | across_up)) & everything
        falls = across_up & diagonal & everything
    return edits


# --- intervals


class Paired(NamedTuple):
    """Tuned minus base, the interval around it, and the two-sided p-value of there being no difference."""

    gain: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    values: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean, in the unit of the values.

    Efron, Tibshirani 1993, "An Introduction to the Bootstrap".

    Args:
        values: one score per sample.
        level: the interval's coverage, between 0 and 1.
        groups: the image (or any key) of each sample. Answers about one image are not independent: whole
            groups are drawn, a mean stays a mean over samples. A single group gives an interval of no width.
    """
    return _interval(_means(values, groups, seed, resamples, level), level)


def paired_bootstrap(
    base: Sequence[float],
    tuned: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Paired:
    """Two models on the same samples in the same order; arguments as for `bootstrap_interval`.

    Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation". The p-value is twice the
    share of resamples on the other side of 0 than the gain, with one added to both counts, so it is never
    below 2 / (resamples + 1).
    """
    if len(base) != len(tuned):
        raise ValueError(f"paired samples: {len(base)} of base, {len(tuned)} of tuned")
    gained = [float(after) - float(before) for before, after in zip(base, tuned, strict=True)]
    drawn = _means(gained, groups, seed, resamples, level)
    return _paired(sum(gained) / len(gained), drawn, level)


def bleu_intervals(
    stats: Sequence[BleuStats],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> list[tuple[float, float]]:
    """The intervals of corpus BLEU-1, -2, -3, -4 from `bleu_stats` of each sample; else as `bootstrap_interval`."""
    drawn = [bleu_from_stats([sums]) for sums in _resample(stats, groups, seed, resamples, level)]
    return [_interval(of_order, level) for of_order in zip(*drawn, strict=True)]


def paired_bleu(
    base: Sequence[BleuStats],
    tuned: Sequence[BleuStats],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> list[Paired]:
    """Two models' corpus BLEU-1, -2, -3, -4 from `bleu_stats` of the same samples; else as `paired_bootstrap`."""

    def gains(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> list[float]:
        return [t - b for b, t in zip(bleu_from_stats(before), bleu_from_stats(after), strict=True)]

    both = [(*before, *after) for before, after in zip(base, tuned, strict=True)]
    middle = len(base[0])
    drawn = [gains([s[:middle]], [s[middle:]]) for s in _resample(both, groups, seed, resamples, level)]
    return [
        _paired(gain, of_order, level)
        for gain, of_order in zip(gains(base, tuned), zip(*drawn, strict=True), strict=True)
    ]


def _means(
    values: Sequence[float], groups: Sequence[Hashable] | None, seed: int, resamples: int, level: float
) -> list[float]:
    """The mean of each resample."""
    if not all(math.isfinite(value) for value in values):
        raise ValueError("cannot bootstrap values that are not finite")
    drawn = _resample([(value, 1) for value in values], groups, seed, resamples, level)
    return [total / count for total, count in drawn]


def _resample(
    rows: Sequence[Sequence[float]], groups: Sequence[Hashable] | None, seed: int, resamples: int, level: float
) -> list[list[float]]:
    """The sum of the rows of each resample. Rows are summed by group first: groups are then cheap to draw."""
    if not rows or resamples < 1 or not 0 < level < 1:
        raise ValueError(f"cannot bootstrap {len(rows)} samples, {resamples} resamples, level {level}")
    if groups is not None and len(groups) != len(rows):
        raise ValueError(f"{len(groups)} groups for {len(rows)} samples")
    sums: dict[Hashable, list[float]] = {}
    for group, row in zip(range(len(rows)) if groups is None else groups, rows, strict=True):
        sums[group] = [a + b for a, b in zip(sums[group], row, strict=True)] if group in sums else list(row)
    import numpy as np  # here, so that scores alone need the standard library alone

    table, random = np.array(list(sums.values()), dtype=float), np.random.default_rng(seed)
    return [table[random.integers(len(table), size=len(table))].sum(0).tolist() for _ in range(resamples)]


def _interval(figures: Iterable[float], level: float) -> tuple[float, float]:
    ordered = sorted(figures)
    return _percentile(ordered, (1 - level) / 2), _percentile(ordered, (1 + level) / 2)


def _paired(gain: float, gains: Sequence[float], level: float) -> Paired:
    rounding = 1e-12  # sums that should be 0 and are not quite
    tail = min(sum(drawn <= rounding for drawn in gains), sum(drawn >= -rounding for drawn in gains))
    return Paired(gain, *_interval(gains, level), min(1.0, 2 * (tail + 1) / (len(gains) + 1)))


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which the share of the sorted values lies, interpolated linearly."""
    position = share * (len(ordered) - 1)
    lower = math.floor(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])
