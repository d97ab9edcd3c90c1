"""Scores of captions against one or more references, and figures of captions alone."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from rapidfuzz.distance import LCSseq

from vlm_lora.inference.metrics.tokens import Level, tokenize

References = Sequence[Sequence[str]]  # per sample, at least one
BleuStats = tuple[int, ...]  # candidate length, reference length, 4 match counts, 4 n-gram counts

MAX_ORDER = 4
"""n-grams of 1 to 4 tokens, in CIDEr-D and BLEU alike."""


def cider_d(candidates: Sequence[str], references: References, level: Level = "word") -> list[float]:
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
    check_texts(references, "references")
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
    """Corpus BLEU-1, -2, -3, -4, each 0 to 1, from `bleu_stats` of its samples, or from their column sums as one row.

    Papineni, Roukos, Ward, Zhu 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation", with
    the brevity penalty against the closest reference length, as COCO's server computes it.
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


def rouge_l(candidates: Sequence[str], references: References, level: Level = "word") -> list[float]:
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
            common = LCSseq.similarity(tokens, other)
            if common:
                precision, recall = max(precision, common / len(tokens)), max(recall, common / len(other))
        both = recall + 1.2**2 * precision
        scores.append((1 + 1.2**2) * precision * recall / both if both else 0.0)
    return scores


def mean_length(captions: Sequence[str], *, level: Level = "word") -> float:
    """Mean number of tokens per caption."""
    check_texts(captions, "captions")
    return sum(len(tokenize(caption, level)) for caption in captions) / len(captions)


def distinct_share(captions: Sequence[str], *, level: Level = "word") -> float:
    """Distinct captions (compared as tokens) / captions; near 0: a model that always says the same."""
    check_texts(captions, "captions")
    return len({tuple(tokenize(caption, level)) for caption in captions}) / len(captions)


def repetition(caption: str, *, level: Level = "word") -> float:
    """The share of a caption's 4-grams that repeat an earlier one of it: 0 none, near 1 a loop."""
    ngrams = [ngram for ngram in _ngrams(tokenize(caption, level)).elements() if len(ngram) == MAX_ORDER]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def check_texts(texts: Sequence[str], name: str) -> None:
    """Raise `ValueError` unless it is a list of at least one string."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"{name}: expected a list of at least one string, got {texts!r}")


def _check_corpus(candidates: Sequence[str], references: References) -> None:
    if isinstance(candidates, str) or not candidates or len(candidates) != len(references):
        raise ValueError(f"expected one list of references per candidate: {len(candidates)}, {len(references)}")
    for index, texts in enumerate(references):
        check_texts(texts, f"references of sample {index}")


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    orders = range(1, MAX_ORDER + 1)
    return Counter(tuple(tokens[i : i + n]) for n in orders for i in range(len(tokens) - n + 1))
