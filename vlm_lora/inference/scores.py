"""What the answers of an evaluation scored: the metrics, the types, and their JSON."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from vlm_lora.inference.metrics.answers import anls, exact_match, vqa_accuracy
from vlm_lora.inference.metrics.boxes import found
from vlm_lora.inference.metrics.captions import References, cider_d, rouge_l
from vlm_lora.inference.metrics.choices import right_option
from vlm_lora.inference.metrics.intervals import Gain, Interval
from vlm_lora.inference.metrics.structured import compared
from vlm_lora.inference.metrics.tokens import Level
from vlm_lora.inference.tasks import ANSWERS, BOXES, CAPTIONS, CHOICES, JSON, TEXTS

FEW_IMAGES = 20
"""Below this, an interval over images says little."""
WHO = ("base", "one_word", "commonest", "tuned", "blanked")
"""Whose answers are scored. One word: of the base, asked for a short answer. Commonest: not a model's, but what the
data says most. Blanked: tuned, shown a grey image in each image's place."""
RIVALS = ("base", "one_word", "commonest")
"""Whom tuned has to beat."""
MODELS = ("base", "tuned", "blanked")
"""Those of whom `Scores` has the scores over everything."""

# --- metrics


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric that is shown: its name, what it means, and what scores each answer.

    ``per_answer`` is None where there is one score of all answers together. Values are fractions that are shown in
    percent, or else are shown as they are.
    """

    name: str
    meaning: str
    per_answer: Callable[[Sequence[str], Sequence["Target"], Level], list[float]] | None
    in_percent: bool = True
    full: float = 1.0
    """The most that it can be."""
    lower_is_better: bool = False

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


class Target(Protocol):
    """What an answer is compared with."""

    @property
    def references(self) -> Sequence[str]: ...

    @property
    def choices(self) -> Sequence[str]: ...


PerAnswer = Callable[[Sequence[str], Sequence[Target], Level], list[float]]


def _each(score: Callable[[str, Sequence[str]], float]) -> PerAnswer:
    return lambda answers, targets, level: [score(a, t.references) for a, t in zip(answers, targets, strict=True)]


def _all(score: Callable[[Sequence[str], References, Level], list[float]]) -> PerAnswer:
    return lambda answers, targets, level: score(answers, [target.references for target in targets], level)


def _right_options(answers: Sequence[str], targets: Sequence[Target], level: Level) -> list[float]:
    return [right_option(a, t.references, t.choices) for a, t in zip(answers, targets, strict=True)]


def _of_json(name: str) -> PerAnswer:
    """That attribute of `Compared`."""
    return _each(lambda answer, references: getattr(compared(answer, references), name))


def _of_boxes(name: str) -> PerAnswer:
    """That attribute of `Found`."""
    return _each(lambda answer, references: getattr(found(answer, references), name))


METRICS = {
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
    "cider_d": Metric(
        "CIDEr-D",
        "how much a caption says that the references say too, rare words counting most, from 0 to 10",
        _all(cider_d),
        in_percent=False,
        full=10.0,
    ),
    "bleu_4": Metric("BLEU-4", "the share of runs of up to four words that occur in a reference", None),
    "rouge_l": Metric("ROUGE-L", "how much of a reference comes in the same order in the caption", _all(rouge_l)),
    "option": Metric("right option", "the share of answers that name it, by its letter or its text", _right_options),
    "letter": Metric("exact letter", "the share of answers that are its letter, and nothing else", _each(exact_match)),
    "json_fields": Metric("fields right", "of the reference's fields, those whose value is equal", _of_json("fields")),
    "json_anls": Metric("fields' ANLS", "how near the spelling of each field comes, in the mean", _of_json("anls")),
    "json_same": Metric("wholly right", "the share of answers with the same fields, all equal", _of_json("same")),
    "json_parses": Metric("is JSON", "the share of answers that can be parsed", _of_json("parses")),
    "json_missing": Metric(
        "fields missing", "of the reference's fields, those left out", _of_json("missing"), lower_is_better=True
    ),
    "json_extra": Metric(
        "fields made up", "of the answer's fields, those not in the reference", _of_json("extra"), lower_is_better=True
    ),
    "box_hit": Metric(
        "boxes right (IoU 0.5)",
        "of the boxes, those that half or more of lies on the right place (intersection over union, whatever they are "
        "called); where an answer has more boxes than the reference, of these",
        _of_boxes("right"),
    ),
    "box_iou": Metric("mean IoU", "the mean intersection over union of the same, 0 of a miss", _of_boxes("overlap")),
    "box_read": Metric("has a box", "the share of answers in which a box can be read", _of_boxes("read")),
}
"""By their names in JSON. Each is of the tasks that name it; those of `ModelScores` are of all answers together too."""


@dataclass(frozen=True, slots=True)
class Task:
    """How the answers of one task are shown: what they are called, their metrics, the most telling first, those that
    rank one answer beside another, and whether an answer is right or wrong, and not more or less so."""

    title: str
    noun: str
    metrics: tuple[str, ...]
    ranked_by: tuple[str, ...]
    right_or_wrong: bool = False


TASKS = {
    CAPTIONS: Task("Captions", "captions", ("cider_d", "bleu_4", "rouge_l"), ("cider_d",)),
    ANSWERS: Task("Questions", "questions", ("exact_match", "vqa_accuracy", "anls"), ("exact_match", "anls"), True),
    CHOICES: Task("Multiple choice", "questions", ("option", "letter"), ("option",), True),
    BOXES: Task("Boxes", "answers with boxes", ("box_hit", "box_iou", "box_read"), ("box_hit", "box_iou")),
    JSON: Task(
        "Answers in JSON",
        "answers in JSON",
        ("json_fields", "json_anls", "json_same", "json_parses", "json_missing", "json_extra"),
        ("json_fields", "json_anls"),
    ),
    TEXTS: Task("Questions with long answers", "long answers", ("rouge_l", "cider_d", "bleu_4"), ("rouge_l",)),
}

STATISTICS = ("mean_words", "distinct", "repetition")
"""Of answers beside their scores: words (or characters) in each, the share that differ, and the mean share of an
answer's 4-grams that it has said before."""

# --- scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """What all answers of one model scored. Everything is a share from 0 to 1, but for `cider_d` and `mean_words`."""

    exact_match: float
    """The share of answers that equal a reference, but for case and a full stop at the end."""
    vqa_accuracy: float
    """Agreement with the human answers (VQA, arXiv:1505.00468)."""
    anls: float
    """How near the spelling comes to a reference (ST-VQA, arXiv:1905.13648)."""
    cider_d: float
    """From 0 to 10 (CIDEr-D, arXiv:1411.5726)."""
    rouge_l: float
    """ROUGE-L (Lin 2004)."""
    bleu_1: float
    """BLEU (Papineni et al. 2002), up to this many words in a row."""
    bleu_2: float
    bleu_3: float
    bleu_4: float
    mean_words: float
    """Words, or characters, of an answer."""
    distinct: float
    """The share of answers that differ from each other."""
    repetition: float
    """The mean share of an answer's 4-grams that it has said before."""


EVERYWHERE = tuple(each.name for each in fields(ModelScores) if each.name in METRICS)
"""The metrics of all answers together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindScores:
    """Of one type of question: the number of answers, each model's exact match, and their VQA accuracy by model."""

    answers: int
    base: float
    tuned: float | None = None
    blanked: float | None = None
    vqa_accuracy: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeScores:
    """Of the questions of one type (`Dialogue.kind`): how many, and the first two metrics of their task, by model.

    ``gains`` has tuned minus each of `RIVALS` in the first metric, from 20 images on.
    """

    answers: int
    scores: dict[str, dict[str, float]]
    gains: dict[str, Gain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """The scores of the answers of one task."""

    examples: int
    answers: int
    reference_words: float
    """The mean number of words of the data's answers."""
    scores: dict[str, dict[str, float]]
    """The scores by model (each of `WHO` that answered) and metric; `STATISTICS` too."""
    intervals: dict[str, dict[str, Interval]]
    """The 95 % intervals of the metrics, by model and metric."""
    gains: dict[str, dict[str, Gain]]
    """Tuned minus each of `RIVALS`, by rival and metric."""
    types: dict[str, TypeScores]
    """The scores by type of question."""
    guess: str | None = None
    """The commonest answer; if it differs by question, the commonest of these."""
    guess_source: str = ""
    """Which data it is the commonest answer of."""
    fields: dict[str, TypeScores] = field(default_factory=dict)
    """For JSON, the scores by field. A field is a path without indices, such as ``items[].name``."""

    @property
    def metrics(self) -> dict[str, Metric]:
        """Those that say something, the most telling first."""
        return {key: METRICS[key] for key in self.scores["base"] if key in METRICS}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "TaskScores":
        made: dict[str, Any] = {
            "intervals": {who: _intervals(of_metric) for who, of_metric in document["intervals"].items()},
            "gains": {rival: _gains(of_metric) for rival, of_metric in document["gains"].items()},
        }
        for which in ("types", "fields"):
            rows = document.get(which, {}).items()
            made[which] = {name: TypeScores(**row | {"gains": _gains(row["gains"])}) for name, row in rows}
        return cls(**document | made)


def _intervals(of_metric: dict[str, Any]) -> dict[str, Interval]:
    return {key: Interval(*ends) for key, ends in of_metric.items()}


def _gains(of_metric: dict[str, Any]) -> dict[str, Gain]:
    return {key: Gain(**gain) for key, gain in of_metric.items()}


@dataclass(frozen=True, slots=True)
class Unmoved:
    """The share of the tuned model's answers that stay the same without their picture, and its 95 % interval."""

    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class FailedExample:
    """An example that was left out because one of its images cannot be used."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Scores:
    """The scores of an evaluation. ``vlm-lora eval --json`` prints them key by key, without what is None or False.

    The report and the verdict use ``tasks``. All other scores are over all answers together: if the data has captions
    and questions, they say little.
    """

    examples: int
    """The number of examples."""
    answers: int
    """The number of questions that were answered."""
    tokens: str
    """The name of the rule that cuts texts into words or characters."""
    reference_words: float
    """The mean number of words of the data's answers."""
    intervals: dict[str, dict[str, Interval]]
    """The 95 % intervals, by model ("base", "tuned", "blanked") and metric, from resampled images. An earlier version
    has none for BLEU."""
    base: ModelScores
    """The scores of the base model."""
    tuned: ModelScores | None = None
    """Those of the tuned model."""
    blanked: ModelScores | None = None
    """Those of the tuned model with grey images, if asked for."""
    gain: dict[str, Gain] | None = None
    """Tuned minus base, by metric."""
    by_kind: dict[str, KindScores]
    """By type of question."""
    base_in_four_bits: bool = False
    """Whether the base is in four bits, because of QLoRA or ``--load-in-4bit``."""
    failed: tuple[FailedExample, ...] = ()
    """The examples that were left out."""
    also: "Scores | None" = None
    """The scores on the other data."""
    unmoved: dict[str, Unmoved] | None = None
    """The share of answers that stay the same with a grey picture ("blanked"), and with another ("other")."""
    tasks: dict[str, TaskScores]
    """The scores of each task: "captions", "answers", "choices", "boxes", "json", "texts"."""

    def __repr__(self) -> str:
        told = []
        for task, of in self.tasks.items():
            key, metric = next(iter(of.metrics.items()))
            values = [f"{who} {metric.text(of.scores[who][key])}" for who in ("base", "tuned") if who in of.scores]
            told.append(f"{TASKS[task].title}, {metric.name}: {', '.join(values)}")
        return f"<Scores of {self.answers:,} answers. {'. '.join(told)}>"

    @property
    def models(self) -> dict[str, ModelScores]:
        """The scores by model, of those that were asked."""
        models = {"base": self.base, "tuned": self.tuned, "blanked": self.blanked}
        return {who: model for who, model in models.items() if model}

    def to_json(self) -> dict[str, Any]:
        return asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None and v is not False})

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Scores":
        """What `to_json` gave, in this version or an earlier one; anything else raises KeyError, TypeError or
        AttributeError."""
        unknown = dict.fromkeys((each.name for each in fields(ModelScores)), math.nan)  # metrics that came later
        made: dict[str, Any] = {who: ModelScores(**unknown | document[who]) for who in MODELS if who in document}
        made["intervals"] = {who: _intervals(of_metric) for who, of_metric in document["intervals"].items()}
        if "gain" in document:
            made["gain"] = _gains(document["gain"])
        made["by_kind"] = {kind: KindScores(**row) for kind, row in document["by_kind"].items()}
        made["failed"] = tuple(FailedExample(**row) for row in document.get("failed", ()))
        if "unmoved" in document:
            made["unmoved"] = {who: Unmoved(**row) for who, row in document["unmoved"].items()}
        if "also" in document:
            made["also"] = cls.from_json(document["also"])
        made["tasks"] = {task: TaskScores.from_json(of_task) for task, of_task in document.get("tasks", {}).items()}
        scores = cls(**document | made)
        return scores if scores.tasks else replace(scores, tasks=scores._as_one_task())

    def _as_one_task(self) -> dict[str, TaskScores]:
        """Of an evaluation by an earlier version, which took everything for captions or everything for answers."""
        task = CAPTIONS if self.reference_words > 4 else ANSWERS
        keys = TASKS[task].metrics
        types = {
            kind: {
                who: {"exact_match": getattr(row, who), "vqa_accuracy": row.vqa_accuracy[who]} for who in self.models
            }
            for kind, row in self.by_kind.items()
        }
        of_task = TaskScores(
            examples=self.examples,
            answers=self.answers,
            reference_words=self.reference_words,
            scores={w: {k: getattr(m, k) for k in (*keys, *STATISTICS)} for w, m in self.models.items()},
            intervals={w: {k: of[k] for k in keys if k in of} for w, of in self.intervals.items()},
            gains={"base": {k: self.gain[k] for k in keys if k in self.gain}} if self.gain is not None else {},
            types={kind: TypeScores(answers=self.by_kind[kind].answers, scores=of) for kind, of in types.items()},
        )
        return {task: of_task}
