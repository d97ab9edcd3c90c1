"""What the answers of an evaluation scored: as types, as JSON, as tables and in sentences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vlm_lora.inference.metrics.answers import anls, exact_match, vqa_accuracy
from vlm_lora.inference.metrics.captions import References, cider_d, rouge_l
from vlm_lora.inference.metrics.intervals import Gain, Interval
from vlm_lora.inference.metrics.tokens import Level

FEW_IMAGES = 20
"""Below this, an interval over images says little."""

WHO = ("base", "tuned", "blanked")
"""Whose answers are scored. Blanked: tuned, shown a grey image in each image's place."""

COLUMNS = {"base": "Base", "tuned": "Tuned", "gain": "Gain", "blanked": "Picture greyed out"}
"""Columns of the tables, in order."""

STATISTICS = (
    ("Words per answer", "mean_words", "{:.1f}"),
    ("Answers that differ", "distinct", "{:.0%}"),
    ("Repeats itself", "repetition", "{:.1%}"),
)
"""What is shown of answers beside their scores: its name in tables and in `ModelScores`, and its form."""

LEGEND = "the 95 % interval, by resampling the images; p: how likely chance alone would make as much of a difference"
"""What the note in a cell of `score_table` is."""

# --- metrics


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric that is shown: its name, what it means, and what scores each answer.

    ``per_answer`` is None where there is one score of all answers together. Values are fractions that are shown in
    percent, or else are shown as they are.
    """

    name: str
    meaning: str
    per_answer: Callable[[Sequence[str], References, Level], list[float]] | None
    in_percent: bool = True

    @property
    def title(self) -> str:
        return self.name[0].upper() + self.name[1:]

    def number(self, value: float, sign: bool = False) -> str:
        value, digits = (100 * value, 1) if self.in_percent else (value, 2)
        return f"{value:{'+' if sign else ''}.{digits}f}"

    def unit(self, points: bool = False) -> str:
        return ("\u00a0points" if points else "\u00a0%") if self.in_percent else ""

    def text(self, value: float, *, points: bool = False, sign: bool = False) -> str:
        """``points``: it is a difference; that of two percentages is in points."""
        return self.number(value, sign) + self.unit(points)

    def span(self, low: float, high: float, sign: bool = False) -> str:
        return f"{self.number(low, sign)} to {self.number(high, sign)}"


def _each(score: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[str], References, Level], list[float]]:
    return lambda answers, references, level: [score(a, r) for a, r in zip(answers, references, strict=True)]


ANSWER_METRICS = {
    "exact_match": Metric(
        "exact match",
        "the share of answers that equal a reference, but for case and a full stop at the end",
        _each(exact_match),
    ),
    "vqa_accuracy": Metric(
        "VQA accuracy",
        "agreement with the human answers: full marks where three or more of them say the same",
        _each(vqa_accuracy),
    ),
    "anls": Metric("ANLS", "how near the spelling comes to a reference, from 0 to 100 %", _each(anls)),
}
CAPTION_METRICS = {
    "cider_d": Metric(
        "CIDEr-D",
        "how much a caption says that the references say too, rare words counting most, from 0 to 10",
        cider_d,
        in_percent=False,
    ),
    "bleu_4": Metric("BLEU-4", "the share of runs of up to four words that occur in a reference", None),
    "rouge_l": Metric("ROUGE-L", "how much of a reference comes in the same order in the caption", rouge_l),
}
METRICS = ANSWER_METRICS | CAPTION_METRICS
"""By the names of their fields in `ModelScores`; the most telling of answers, and of captions, first."""

# --- scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """What all answers of one model scored: each metric, words (or characters) per answer, the share of answers that
    differ, and the mean share of an answer's 4-grams that it has said before."""

    exact_match: float
    vqa_accuracy: float
    anls: float
    cider_d: float
    rouge_l: float
    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    mean_words: float
    distinct: float
    repetition: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KindScores:
    """Of one kind of question: the number of answers, the exact match of each model, and their VQA accuracy by name."""

    answers: int
    base: float
    tuned: float | None = None
    blanked: float | None = None
    vqa_accuracy: dict[str, float]


@dataclass(frozen=True, slots=True)
class Unmoved:
    """The share of the tuned model's answers that stay the same without their picture, and the interval around it."""

    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class FailedExample:
    """An example that was left out, as one of its images cannot be used."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What ``eval --json`` prints, key by key; what is None or False is left out there.

    Attributes:
        tokens: name of what the metrics took for a word.
        reference_words: how many words the data's answers have in the mean.
        intervals: of base, tuned and blanked, those of each metric. An earlier version gave none for BLEU.
        gain: of tuned over base, by metric.
        base_in_four_bits: base and tuned are those of a base in four bits.
        also: the scores on the other data.
        unmoved: answers that stay the same with the picture ``blanked``, and with an ``other`` one in its place.
    """

    examples: int
    answers: int
    tokens: str
    reference_words: float
    intervals: dict[str, dict[str, Interval]]
    base: ModelScores
    tuned: ModelScores | None = None
    blanked: ModelScores | None = None
    gain: dict[str, Gain] | None = None
    by_kind: dict[str, KindScores]
    base_in_four_bits: bool = False
    failed: tuple[FailedExample, ...] = ()
    also: "Scores | None" = None
    unmoved: dict[str, Unmoved] | None = None

    @property
    def models(self) -> dict[str, ModelScores]:
        """The scores of each of `WHO` that was asked."""
        models = {"base": self.base, "tuned": self.tuned, "blanked": self.blanked}
        return {who: model for who, model in models.items() if model}

    @property
    def of_captions(self) -> bool:
        """Whether the data's answers are captions; how much the models say is another matter."""
        return self.reference_words > 4

    @property
    def headline(self) -> dict[str, Metric]:
        """The metrics worth a look."""
        return CAPTION_METRICS if self.of_captions else ANSWER_METRICS

    def to_json(self) -> dict[str, Any]:
        return asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None and v is not False})

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Scores":
        """What `to_json` gave, in this version or an earlier one; anything else raises KeyError, TypeError or
        AttributeError."""
        unknown = dict.fromkeys((each.name for each in fields(ModelScores)), math.nan)  # metrics that came later
        made: dict[str, Any] = {who: ModelScores(**unknown | document[who]) for who in WHO if who in document}
        made["intervals"] = {
            who: {key: Interval(*ends) for key, ends in of_metric.items()}
            for who, of_metric in document["intervals"].items()
        }
        if "gain" in document:
            made["gain"] = {key: Gain(**gain) for key, gain in document["gain"].items()}
        made["by_kind"] = {kind: KindScores(**row) for kind, row in document["by_kind"].items()}
        made["failed"] = tuple(FailedExample(**row) for row in document.get("failed", ()))
        if "unmoved" in document:
            made["unmoved"] = {who: Unmoved(**row) for who, row in document["unmoved"].items()}
        if "also" in document:
            made["also"] = cls.from_json(document["also"])
        return cls(**document | made)


# --- sentences


def summary(scores: Scores) -> list[str]:
    """One sentence on the gain, honest where there is none; others on what there is to know about it."""
    key, metric = next(iter(scores.headline.items()))
    images, base, tuned = scores.examples, scores.base, scores.tuned
    where = f"on {images:,} held-out {'image' if images == 1 else 'images'}"
    before = metric.text(getattr(base, key))
    if tuned is None or scores.gain is None:
        interval = f"95\u00a0% interval {metric.span(*scores.intervals['base'][key])}{metric.unit()}"
        return [f"The base model alone, {where}: {metric.name} {before} ({interval})."]
    gain, after = scores.gain[key], metric.text(getattr(tuned, key))
    size = metric.text(abs(gain.gain), points=True)
    interval = f"95\u00a0% interval {metric.span(gain.low, gain.high)}{metric.unit(points=True)}"
    if images < FEW_IMAGES:
        sentence = (
            f"Too few images to tell: {where}, {metric.name} went from {before} to {after}. "
            f"Hold out {FEW_IMAGES} or more to know whether that is a gain."
        )
    elif gain.low > 0:
        sentence = (
            f"Tuning helped: {where}, {metric.name} rose from {before} to {after}, a gain of {size} ({interval})."
        )
    elif gain.high < 0:
        sentence = (
            f"Tuning did harm: {where}, {metric.name} fell from {before} to {after}, a loss of {size} ({interval})."
        )
    else:
        sentence = (
            f"No gain that chance could not explain: {where}, {metric.name} went from {before} to {after} "
            f"(difference {metric.text(gain.gain, points=True, sign=True)}; {interval}, which includes zero)."
        )
    sentences = [sentence]
    if key == "exact_match" and gain.gain > 0 and base.mean_words > 2 * tuned.mean_words:
        sentences.append(
            f"Part of it is form: the base model answers in {base.mean_words:.1f} words on average, the tuned "
            f"one in {tuned.mean_words:.1f}, and a right answer in a sentence is no exact match."
        )
    if scores.base_in_four_bits:
        sentences.append("Base here is the base in four bits, as QLoRA was trained on it; whole, it may do better.")
    if scores.blanked:
        without = metric.text(getattr(scores.blanked, key))
        sentences.append(f"With every picture greyed out, the tuned model's {metric.name} is {without}.")
    if scores.unmoved:
        how = {"blanked": "with the picture greyed out", "other": "with another picture in its place"}
        shares = [
            f"{100 * u.share:.0f}\u00a0% ({100 * u.low:.0f} to {100 * u.high:.0f}) {how[who]}"
            for who, u in scores.unmoved.items()
        ]
        sentences.append(f"Of the tuned model's answers, these stay the same: {'; '.join(shares)}.")
    return sentences


# --- tables


@dataclass(frozen=True, slots=True)
class Cell:
    value: str
    note: str = ""
    verdict: Literal["", "good", "bad"] = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.note})" if self.note else self.value


@dataclass(frozen=True, slots=True)
class Table:
    """Titles of the columns, that of the names first; and rows of a name and cells, the minor ones apart."""

    titles: list[str]
    rows: list[list[Cell]]
    minor: list[list[Cell]]

    def to_text(self) -> str:
        """Aligned by spaces, for a console."""
        lines = [self.titles, *([str(cell) for cell in row] for row in self.rows + self.minor)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines).replace("\u00a0", " ")

    def to_markdown(self) -> str:
        """Without the minor rows."""
        lines = [self.titles, ["---"] * len(self.titles), *([str(cell) for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables_as_text(scores: Scores) -> str:
    """For a console."""
    parts = [score_table(scores).to_text(), f"In brackets: {LEGEND}."]
    return "\n\n".join([*parts, *([kind_table(scores).to_text()] if scores.by_kind else [])])


def score_table(scores: Scores) -> Table:
    """Base, tuned, the gain, and tuned with pictures greyed out; the notes are explained by `LEGEND`."""
    columns = [column for column in COLUMNS if getattr(scores, column)]

    def cell(key: str, column: str) -> Cell:
        if column == "gain":
            return _gain_cell(scores, key)
        interval, metric = scores.intervals[column].get(key), METRICS[key]
        note = metric.span(*interval) if interval else ""
        return Cell(metric.text(getattr(scores.models[column], key)), note)

    def figure(name: str, form: str, column: str) -> Cell:
        return Cell("" if column == "gain" else form.format(getattr(scores.models[column], name)))

    return Table(
        ["", *(COLUMNS[column] for column in columns)],
        [[Cell(metric.title), *(cell(key, column) for column in columns)] for key, metric in scores.headline.items()],
        [[Cell(title), *(figure(name, form, column) for column in columns)] for title, name, form in STATISTICS],
    )


def _gain_cell(scores: Scores, key: str) -> Cell:
    metric, gain = METRICS[key], (scores.gain or {}).get(key)
    if gain is None:  # BLEU of an earlier version's evaluation
        difference = getattr(scores.tuned, key) - getattr(scores.base, key)
        return Cell(metric.text(difference, points=True, sign=True))
    text, note = metric.text(gain.gain, points=True, sign=True), metric.span(gain.low, gain.high, sign=True)
    if scores.examples < FEW_IMAGES:  # as the summary says, too few to tell: no colour, no p
        return Cell(text, note)
    verdict = "good" if gain.low > 0 else "bad" if gain.high < 0 else ""
    return Cell(text, f"{note}, p\u00a0{gain.p_value:.3f}", verdict)


def kind_table(scores: Scores) -> Table:
    """Exact match, and VQA accuracy as the note, by kind of question; the note of a kind is its number of answers."""
    exact, vqa = METRICS["exact_match"], METRICS["vqa_accuracy"]
    rows = []
    for kind, row in scores.by_kind.items():
        rows.append([Cell(kind, f"{row.answers:,}")])
        for who in scores.models:
            note = f"{vqa.name} {vqa.text(row.vqa_accuracy[who])}"
            rows[-1].append(Cell(exact.text(getattr(row, who)), note))
    return Table(["Exact match by kind of question", *(COLUMNS[who] for who in scores.models)], rows, [])
