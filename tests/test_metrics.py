"""Metrics against published figures and against pycocoevalcap, frozen here as numbers.

pycocoevalcap 1.2's ``cider`` calls itself CIDEr but implements CIDEr-D: counts clipped to the reference and a
Gaussian length penalty (sigma 6); like ours it does not stem. So it is the oracle of `cider_d`. Its BLEU adds
1e-15 and 1e-9 against division by zero, hence the tolerance of 1e-8 there. Its tokenizer is the Java one.
The numbers below came from (CANDIDATES, REFERENCES as in this file):

    tokenize = PTBTokenizer().tokenize
    gts = tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(REFERENCES)})
    res = tokenize({i: [{"caption": text}] for i, text in enumerate(CANDIDATES)})
    for metric in (Cider(), Bleu(4), Rouge()):
        print(metric.method(), *metric.compute_score(gts, res))
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_lora.inference.metrics.answers import anls, exact_match, normalize_answer, vqa_accuracy
from vlm_lora.inference.metrics.captions import (
    bleu_from_stats,
    bleu_stats,
    cider_d,
    distinct_share,
    mean_length,
    repetition,
    rouge_l,
)
from vlm_lora.inference.metrics.intervals import Bootstrap, Gain
from vlm_lora.inference.metrics.tokens import level_for, tokenize

CANDIDATES = [
    "A man rides a wave on a surfboard.",
    "A black-and-white cat sleeps on the sofa, next to a dog.",
    "Two children play in the park",
    "A plate of food on a table",
    "a man's dog isn't on the beach",
    "A train train train train on the tracks",
]
REFERENCES = [
    [
        "A man riding a wave on top of a surfboard.",
        "A surfer rides a large wave.",
        "Someone on a surfboard in the ocean",
    ],
    ["A black-and-white cat is asleep on a sofa.", "A cat sleeps next to a dog on the sofa."],
    ["Two children play in the park."],
    [
        "A sandwich and fries on a white plate.",
        "A plate of food on a wooden table.",
        "Food on a plate",
        "Lunch, served on a table",
    ],
    ["A dog runs along the beach!", "The man's dog isn't on a leash at the beach."],
    ["A red train on the tracks near a station.", "A train travels down the tracks."],
]
ORACLE_CIDER = [
    2.1496417575799773,
    3.52857302220173,
    10.0,
    3.467002526035568,
    3.25698553340051,
    1.7215118165876797,
]
ORACLE_BLEU = [0.938775510184923, 0.8741393489001277, 0.7569368299303143, 0.6263289349872866]
ORACLE_ROUGE = [
    0.7624999999999998,
    0.6724409448818898,
    1.0,
    0.9222462203023757,
    0.7427701674277016,
    0.6489361702127661,
]
# The README of aac-metrics 0.5 gives CIDEr-D 0.9614 for this pair, BLEU-1 0.4278; pycocoevalcap's run agrees.
AAC_CANDIDATES = ["a man is speaking", "rain falls"]
AAC_REFERENCES = [
    ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
    ["rain is falling hard on a surface"],
]
# The left is a caption, the right what pycocoevalcap's PTBTokenizer made of it.
ORACLE_TOKENS = [
    ("A black-and-white cat's paw; isn't it cute?", "a black-and-white cat 's paw is n't it cute"),
    ("The dogs' toys, don't cannot gonna (red)", "the dogs toys do n't can not gon na -lrb- red -rrb-"),
    ("A sign that says \"STOP\" and 'go'.", "a sign that says stop and go"),
    ("Two people -- a man and a woman - walk...", "two people a man and a woman walk"),
    (
        "A U.S. flag at 10:30 a.m. on St. John's street",
        "a u.s. flag at 10:30 a.m. on st. john 's street",
    ),
    ("It costs $3.50, 50% off & 1,000 others", "it costs $ 3.50 50 % off & 1,000 others"),
    ("a t-shirt w/ and/or 1/2 of it", "a t-shirt w / and/or 1/2 of it"),
    ("I'm you're they've she'll he'd let's it's", "i 'm you 're they 've she 'll he 'd let 's it 's"),
    ("a man — with – dash… café naïve", "a man with dash café naïve"),
    ("a man’s “hat” isn’t ‘here’", "a man 's hat is n't here"),
    (
        "1990s rock'n'roll o'clock 5'10\" y'all ma'am",
        "1990s rock 'n' roll o'clock 5 10 y' all ma'am",
    ),
    ("No. 5 on a no. Yes", "no. 5 on a no yes"),
    ("a dog,a cat.", "a dog a cat"),
    ("plan b.", "plan b."),
]
CHINESE = "一只狗在草地上奔跑。"


def bleu(candidates, references, level="word") -> list[float]:
    pairs = zip(candidates, references, strict=True)
    return bleu_from_stats([bleu_stats(candidate, texts, level=level) for candidate, texts in pairs])


# --- tokens


@pytest.mark.parametrize(("caption", "expected"), ORACLE_TOKENS)
def test_word_tokens_equal_the_java_tokenizer(caption, expected):
    assert tokenize(caption) == expected.split()


def test_word_tokens_keep_combining_marks_and_drop_emoji():
    assert tokenize("एक कुत्ता घास पर।") == ["एक", "कुत्ता", "घास", "पर"]
    assert tokenize("I \u2764\ufe0f cafe\u0301 \U0001f436") == ["i", "caf\u00e9"]
    assert tokenize(" .,!? ") == []


def test_char_tokens():
    assert tokenize(CHINESE, "char") == list("一只狗在草地上奔跑")
    assert tokenize("犬が２匹、ｶﾞ!", "char") == ["犬", "が", "2", "匹", "ガ"]
    assert len(tokenize(CHINESE)) == 1  # why the level matters
    with pytest.raises(ValueError, match="level"):
        tokenize("x", "letters")


# --- captions


def test_captions_equal_pycocoevalcap():
    assert cider_d(CANDIDATES, REFERENCES) == pytest.approx(ORACLE_CIDER, abs=1e-12)
    assert bleu(CANDIDATES, REFERENCES) == pytest.approx(ORACLE_BLEU, rel=1e-8)
    assert rouge_l(CANDIDATES, REFERENCES) == pytest.approx(ORACLE_ROUGE, abs=1e-12)


def test_live_pycocoevalcap_agrees_on_random_texts():
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    bleu_oracle = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    rng = random.Random(0)

    def text():
        return " ".join(rng.choices(["red", "dog", "on", "table"], k=rng.randint(1, 12)))

    references = [[text() for _ in range(rng.randint(1, 5))] for _ in range(40)]
    candidates = [text() for _ in references]
    gts, res = dict(enumerate(references)), {i: [candidate] for i, candidate in enumerate(candidates)}
    assert cider_d(candidates, references) == pytest.approx(list(cider.Cider().compute_score(gts, res)[1]))
    assert rouge_l(candidates, references) == pytest.approx(list(rouge.Rouge().compute_score(gts, res)[1]))
    oracle = bleu_oracle.Bleu(4).compute_score(gts, res, verbose=0)[0]
    assert bleu(candidates, references) == pytest.approx(oracle, rel=1e-6)


def test_captions_equal_aac_metrics_readme():
    scores = cider_d(AAC_CANDIDATES, AAC_REFERENCES)
    assert scores == pytest.approx([1.3641, 0.5587], abs=5e-5)
    assert sum(scores) / 2 == pytest.approx(0.9614, abs=5e-5)
    assert bleu(AAC_CANDIDATES, AAC_REFERENCES)[0] == pytest.approx(0.4278, abs=5e-5)  # brevity penalty at work


def test_bleu_published():
    # Papineni et al. 2002, section 2.1: modified unigram precision 2/7
    the = bleu(["the the the the the the the"], [["The cat is on the mat.", "There is a cat on the mat."]])
    assert the == pytest.approx([2 / 7, 0, 0, 0])
    # the example of NLTK's corpus_bleu, 0.5920778868801042; its first half is from Papineni et al.
    candidates = [
        "It is a guide to action which ensures that the military always obeys the commands of the party",
        "he read the book because he was interested in world history",
    ]
    references = [
        [
            "It is a guide to action that ensures that the military will forever heed Party commands",
            "It is the guiding principle which guarantees the military forces "
            + "always being under the command of the Party",
            "It is the practical guide for the army always to heed the directions of the party",
        ],
        ["he was interested in world history because he read the book"],
    ]
    assert bleu(candidates, references)[3] == pytest.approx(0.5920778868801042, abs=1e-12)


def test_rouge_l_published():
    # Lin 2004, section 3.1: S2 0.75 and S3 0.5 against S1, for any beta as precision equals recall
    scores = rouge_l(["police kill the gunman", "the gunman kill police"], [["police killed the gunman"]] * 2)
    assert scores == pytest.approx([0.75, 0.5])


def test_bleu_statistics_add_up():
    stats = [bleu_stats(candidate, texts) for candidate, texts in zip(CANDIDATES, REFERENCES, strict=True)]
    assert stats[2] == (6, 6, 6, 5, 4, 3, 6, 5, 4, 3)
    assert stats[5][:3] == (8, 9, 5)  # "train" counts once
    sums = [sum(column) for column in zip(*stats, strict=True)]
    assert bleu_from_stats([sums]) == bleu_from_stats(stats) == bleu(CANDIDATES, REFERENCES)


def test_bleu_closest_length_prefers_the_shorter_of_two():
    assert bleu_stats("a b c d", ["a b c", "a b c d e", "a"])[:2] == (4, 3)


def test_identical_captions_score_highest():
    captions = [texts[0] for texts in REFERENCES]
    single = [[caption] for caption in captions]
    assert cider_d(captions, single) == pytest.approx([10.0] * 6)
    assert bleu(captions, REFERENCES) == [1.0] * 4
    assert rouge_l(captions, REFERENCES) == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("level", ["word", "char"])
def test_scores_stay_in_bounds_and_order_does_not_matter(level):
    rng = random.Random(1)
    candidates = [" ".join(rng.choices("abc", k=rng.randint(0, 9))) for _ in range(30)]
    references = [[" ".join(rng.choices("abc", k=rng.randint(1, 9))) for _ in range(3)] for _ in range(30)]
    order = rng.sample(range(30), 30)
    shuffled = [candidates[i] for i in order], [references[i][::-1] for i in order]
    for metric, top in ((cider_d, 10.0), (rouge_l, 1.0)):
        scores = metric(candidates, references, level=level)
        assert all(0.0 <= score <= top + 1e-9 for score in scores)
        assert len({round(score, 9) for score in scores}) > 10
        assert metric(*shuffled, level=level) == pytest.approx([scores[i] for i in order])
    scores = bleu(candidates, references, level=level)
    assert 1.0 > scores[0] > scores[1] > scores[2] > scores[3] > 0.0
    assert bleu(*shuffled, level=level) == pytest.approx(scores)


def test_char_level_sees_partial_matches():
    candidates, references = ["一只猫在草地上", "两个人"], [[CHINESE], ["两个人走路"]]
    assert rouge_l(candidates, references) == [0.0, 0.0]
    expected = (1 + 1.44) * (6 / 7) * (6 / 9) / (6 / 9 + 1.44 * 6 / 7)
    assert rouge_l(candidates, references, level="char")[0] == pytest.approx(expected)
    assert bleu(candidates, references, level="char")[0] == pytest.approx(0.9 * 2.718281828 ** (1 - 14 / 10))
    assert all(score > 0 for score in cider_d(candidates, references, level="char"))


def test_empty_caption_scores_zero_and_single_image_has_no_cider():
    assert cider_d(["", "a dog"], [["a cat"], ["a dog"]])[0] == 0.0
    assert rouge_l([""], [["a cat"]]) == [0.0]
    assert bleu([""], [["a cat"]]) == [0.0] * 4
    assert cider_d(["a cat sits here"], [["a cat sits here"]]) == [0.0]


@pytest.mark.parametrize("metric", [cider_d, rouge_l])
@pytest.mark.parametrize(
    ("candidates", "references"),
    [([], []), (["a"], []), (["a"], [[]]), (["a"], ["a reference"]), ("a", [["a"]])],
)
def test_malformed_corpora_are_refused(metric, candidates, references):
    with pytest.raises(ValueError, match="expected"):
        metric(candidates, references)


def test_bleu_of_nothing_is_refused():
    for references in ([], "a reference"):
        with pytest.raises(ValueError, match="expected a list"):
            bleu_stats("a", references)
    with pytest.raises(ValueError, match="no samples"):
        bleu_from_stats([])


def test_text_statistics():
    assert mean_length(["A dog.", "Two dogs, asleep on grass!"]) == 3.5
    assert mean_length([CHINESE], level="char") == 9
    assert distinct_share(["A dog.", "a dog", "a cat", "a cat!"]) == 0.5
    assert repetition("a man on a horse") == 0.0
    assert repetition("go on") == 0.0
    # 8 words, 5 four-grams, the fifth is the first again
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("dog " * 50) == pytest.approx(1 - 1 / 47)


# --- answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  The Red\tcar.\n", "red car"),
        ("None", "0"),
        ("two dogs and ten cats", "2 dogs and 10 cats"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("don't", "don't"),
        ("t-shirt", "t shirt"),
        ("yes, sir", "yes sir"),
        ("red,white", "red white"),
        ("red - white", "red white"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("3.5", "3.5"),
        ("5 p.m.", "5 pm"),
        ("10:30", "10:30"),
        ("a", "a"),
        ("?", ""),
    ],
)
def test_normalize_answer(answer, expected):
    assert normalize_answer(answer) == expected
    assert normalize_answer(expected) == expected


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_humans(matches, expected):
    humans = ["2"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("two", humans) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "humans", "expected"),
    [  # worked out by hand from vqaEval.py of GT-Vision-Lab/VQA
        ("three", ["three"] * 10, 0.0),  # the model's is "3"; humans keep their words
        ("3", ["3"] * 10, 1.0),
        ("the dog", ["the dog"] * 4 + ["cat"] * 6, 0.0),  # and their articles
        ("dog", ["Dog"] * 4 + ["cat"] * 6, 0.0),  # and their case
        ("t-shirt", ["t-shirt"] * 10, 0.0),  # all alike: not even punctuation goes
        ("t-shirt", ["t-shirt"] * 4 + ["shirt"] * 6, 1.0),
        ("yes.", ["yes."] * 3 + ["yes"] * 1 + ["no"] * 6, 1.0),
    ],
)
def test_vqa_accuracy_normalises_as_the_official_code_does(answer, humans, expected):
    assert vqa_accuracy(answer, humans) == pytest.approx(expected)


def test_vqa_accuracy_of_few_humans():
    assert vqa_accuracy("The dog.", ["dog"]) == 1.0
    assert vqa_accuracy("cat", ["dog"]) == 0.0
    assert vqa_accuracy("dog", ["dog"] * 2) == pytest.approx(1 / 3)
    assert vqa_accuracy("dog", ["dog"] * 3) == pytest.approx(2 / 3)
    assert vqa_accuracy("", ["a"]) == 0.0  # an article that is the answer does not vanish


@pytest.mark.parametrize("answer", ["Stop", " STOP.\n", "stop .", "stop。"])
def test_exact_match(answer):
    assert exact_match(answer, ["halt", "Stop."]) == 1.0


@pytest.mark.parametrize("answer", ["stop!", "the stop", "s top", "stop..", "", "."])
def test_no_exact_match(answer):
    assert exact_match(answer, ["halt", "stop"]) == 0.0


def test_anls():
    assert anls("Kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)  # Levenshtein's textbook pair: 3 edits
    assert anls(" sitting\n", ["kitten", "Sitting"]) == 1.0
    assert anls("ab", ["ax"]) == 0.0  # half of it wrong: at the threshold
    assert anls("ab", ["ax"], threshold=0.6) == 0.5
    assert anls("", ["x"]) == 0.0
    assert anls("saturday", ["sunday"]) == anls("sunday", ["saturday"]) == pytest.approx(1 - 3 / 8)


@given(st.lists(st.sampled_from("abc"), max_size=60), st.lists(st.sampled_from("abcd"), min_size=1, max_size=60))
def test_edit_distance_and_common_subsequence_equal_the_tables(left, right):
    edits = [list(range(len(right) + 1))]
    common = [[0] * (len(right) + 1)]
    for i, char in enumerate(left):
        edits.append([i + 1])
        common.append([0])
        for j, other in enumerate(right):
            edits[-1].append(min(edits[i][j + 1] + 1, edits[-1][j] + 1, edits[i][j] + (char != other)))
            common[-1].append(common[i][j] + 1 if char == other else max(common[i][j + 1], common[-1][j]))
    longest = max(len(left), len(right))
    assert anls("".join(left), ["".join(right)], threshold=2.0) == 1 - edits[-1][-1] / longest
    precision, recall = common[-1][-1] / (len(left) or 1), common[-1][-1] / len(right)
    both = recall + 1.2**2 * precision
    expected = (1 + 1.2**2) * precision * recall / both if both else 0.0
    assert rouge_l([" ".join(left)], [[" ".join(right)]]) == [expected]


def test_the_level_is_found_out():
    assert level_for(["A red circle.", "红色的圆"]) == "word"
    assert level_for(["图中有一个红色的圆 OK", "赤い丸があります。"]) == "char"
    assert level_for(["汉字 abc"]) == "word"
    assert level_for(["汉字字 ab"]) == "char"
    assert level_for(["123"]) == "word"


@pytest.mark.parametrize("metric", [vqa_accuracy, exact_match, anls])
@pytest.mark.parametrize("accepted", [[], "yes"])
def test_accepted_answers_must_be_a_list(metric, accepted):
    with pytest.raises(ValueError, match="expected a list"):
        metric("yes", accepted)


# --- intervals


def test_bootstrap_interval_is_close_to_the_normal_one_and_deterministic():
    rng = random.Random(2)
    values = [rng.gauss(0.5, 0.2) for _ in range(400)]
    low, high = Bootstrap().interval(values)
    mean = sum(values) / 400
    error = (sum((value - mean) ** 2 for value in values) / 400) ** 0.5 / 400**0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert Bootstrap().interval(values) == (low, high)
    assert Bootstrap(seed=1).interval(values) != (low, high)
    narrow = Bootstrap(level=0.5).interval(values)
    assert low < narrow[0] < mean < narrow[1] < high


def test_groups_widen_the_interval_of_dependent_answers():
    rng = random.Random(3)
    per_image = [rng.random() for _ in range(60)]
    values = [value for value in per_image for _ in range(10)]
    images = [f"{i}.jpg" for i in range(60) for _ in range(10)]
    naive = Bootstrap(resamples=500).interval(values)
    grouped = Bootstrap(groups=images, resamples=500).interval(values)
    assert grouped[1] - grouped[0] > 2 * (naive[1] - naive[0])
    # ten equal answers of an image tell no more than one
    assert grouped == pytest.approx(Bootstrap(resamples=500).interval(per_image))
    assert Bootstrap(groups=["x", "x"]).interval([0.0, 1.0]) == (0.5, 0.5)


def test_unequal_groups_keep_the_mean_over_samples():
    bootstrap = Bootstrap(groups=["x", "x", "x", "y"])
    low, high = bootstrap.interval([1.0, 1.0, 1.0, 0.0])
    assert (low, high) == (0.0, 1.0)
    gain = bootstrap.gain([0.0] * 4, [1.0, 1.0, 1.0, 0.0]).gain
    assert gain == 0.75


def test_paired_bootstrap_of_equal_models_finds_nothing():
    rng = random.Random(4)
    values = [rng.random() for _ in range(50)]
    assert Bootstrap(resamples=200).gain(values, values) == Gain(0.0, 0.0, 0.0, 1.0)
    noisy = [value + rng.gauss(0, 0.1) for value in values]
    paired = Bootstrap().gain(values, noisy)
    assert paired.low < 0 < paired.high


def test_paired_bootstrap_finds_a_gain_that_unpaired_intervals_hide():
    rng = random.Random(5)
    base = [rng.random() for _ in range(100)]
    tuned = [value + rng.uniform(-0.04, 0.08) for value in base]
    paired = Bootstrap().gain(base, tuned)
    assert paired.gain == pytest.approx((sum(tuned) - sum(base)) / 100)
    assert 0 < paired.low < paired.gain < paired.high
    assert paired.p_value == pytest.approx(2 / 2001)
    assert Bootstrap().interval(base).high > Bootstrap().interval(tuned).low
    back = Bootstrap().gain(tuned, base)
    assert (back.low, back.high) == pytest.approx((-paired.high, -paired.low))
    assert back.p_value == paired.p_value


def test_bleu_has_intervals_and_a_paired_test():
    rng = random.Random(7)
    words = ["a", "man", "on", "the", "red", "horse", "rides", "by", "far", "away"]
    references = [[" ".join(rng.choices(words, k=8))] for _ in range(80)]
    half = [texts[0] if rng.random() < 0.5 else "a dog" for texts in references]
    most = [texts[0] if rng.random() < 0.5 else text for text, texts in zip(half, references, strict=True)]
    base, tuned = ([bleu_stats(c, r) for c, r in zip(said, references, strict=True)] for said in (half, most))
    intervals, gains = Bootstrap().bleu_intervals(base), Bootstrap().bleu_gains(base, tuned)
    for order, value in enumerate(bleu(half, references)):
        assert intervals[order][0] < value < intervals[order][1]
        assert gains[order].gain == pytest.approx(bleu(most, references)[order] - value)
        assert 0 < gains[order].low < gains[order].gain < gains[order].high
        assert gains[order].p_value < 0.01
    assert Bootstrap().bleu_gains(base, base) == [Gain(0.0, 0.0, 0.0, 1.0)] * 4
    # ten equal answers of an image tell no more than one
    ten, images = [row for row in base for _ in range(10)], [i for i in range(80) for _ in range(10)]
    for grouped, alone in zip(Bootstrap(groups=images).bleu_intervals(ten), intervals, strict=True):
        assert grouped == pytest.approx(alone)
    with pytest.raises(ValueError, match="0 samples"):
        Bootstrap().bleu_intervals([])


def test_p_value_agrees_with_the_interval():
    rng = random.Random(6)
    for shift in (0.0, 0.01, 0.02, 0.03, 0.04):
        tuned = [rng.gauss(shift, 0.1) for _ in range(60)]
        paired = Bootstrap(resamples=999).gain([0.0] * 60, tuned)
        if abs(paired.p_value - 0.05) > 0.01:
            assert (paired.p_value < 0.05) == (paired.low > 0 or paired.high < 0)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "0 samples"),
        ([1.0], {"resamples": 0}, "0 resamples"),
        ([1.0], {"level": 95}, "level 95"),
        ([1.0, float("nan")], {}, "not finite"),
        ([1.0, 2.0], {"groups": ["x"]}, "1 groups for 2 samples"),
    ],
)
def test_impossible_bootstraps_are_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        Bootstrap(**options).interval(values)
    with pytest.raises(ValueError, match=message):
        Bootstrap(**options).gain(values, values)


def test_paired_bootstrap_needs_pairs():
    with pytest.raises(ValueError, match="2 of base, 1 of tuned"):
        Bootstrap().gain([1.0, 2.0], [1.0])
