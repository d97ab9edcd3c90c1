"""What was answered, and its scores: of each answer by each metric, their means, and intervals over images."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_lora.data.example import ImageRef
from vlm_lora.inference.commonest import commonest_of
from vlm_lora.inference.metrics import captions
from vlm_lora.inference.metrics.boxes import Corners
from vlm_lora.inference.metrics.intervals import Bootstrap, Gain, Interval
from vlm_lora.inference.metrics.structured import field_scores, fields_of
from vlm_lora.inference.metrics.tokens import TOKENIZER_ID, Level
from vlm_lora.inference.scores import (
    EVERYWHERE,
    FEW_IMAGES,
    METRICS,
    MODELS,
    RIVALS,
    TASKS,
    WHO,
    KindScores,
    ModelScores,
    Scores,
    TaskScores,
    TypeScores,
)
from vlm_lora.inference.tasks import ANSWERS

BLEU = [f"bleu_{order}" for order in range(1, captions.MAX_ORDER + 1)]


@dataclass(frozen=True, slots=True)
class Answered:
    """One question about one example, the data's answers, and what each model answered; None: it was not asked."""

    example: str
    """The id of the example."""
    images: tuple[ImageRef, ...]
    question: str
    """As the model reads it."""
    kind: str | None
    """The type of the question, if the data names one."""
    references: tuple[str, ...]
    """The answers of the data."""
    base: str | None = None
    """The base model's answer."""
    tuned: str | None = None
    """The answer with the adapter."""
    blanked: str | None = None
    """The answer with the adapter, to a plain grey image of the same size."""
    one_word: str | None = None
    """The base model's, asked for a single word or phrase."""
    commonest: str | None = None
    """What the data says most to such a question."""
    task: str = ANSWERS
    """What it is scored as: "captions", "answers", "choices", "boxes", "json" or "texts" (long answers)."""
    choices: tuple[str, ...] = ()
    """The options of a multiple choice, that of A first."""
    frames: tuple[Corners, ...] = ()
    """For answers with boxes: (left, top, width, height) of each image in the answers' coordinates, if known."""

    def answer(self, who: str) -> str:
        """That of one of `WHO` that has one."""
        return getattr(self, who)

    def has(self, who: str) -> bool:
        """Whether this one of `WHO` has an answer."""
        return getattr(self, who) is not None


def level_of(tokens: str) -> Level:
    """From what `Scores.tokens` calls it."""
    return next(level for level, name in TOKENIZER_ID.items() if name == tokens)


def by_task(answered: Sequence[Answered]) -> dict[str, list[int]]:
    """The places of the answers of each task, in the order of `TASKS`."""
    places = {task: [i for i, row in enumerate(answered) if row.task == task] for task in TASKS}
    return {task: of_task for task, of_task in places.items() if of_task}


def values_of(answered: Sequence[Answered], level: Level) -> dict[str, dict[str, list[float]]]:
    """`Evaluation.values`: of everybody the score of each answer, by every metric that gives one."""
    values = {}
    for who in WHO:
        of: dict[str, list[float]] = {}
        for task, of_task in by_task(answered).items():
            places = [i for i in of_task if answered[i].has(who)]
            answers = [answered[i].answer(who) for i in places]
            targets = [answered[i] for i in places]
            for key in dict.fromkeys((*EVERYWHERE, *TASKS[task].metrics)) if places else ():
                if score := METRICS[key].per_answer:
                    line = of.setdefault(key, [math.nan] * len(answered))
                    for i, value in zip(places, score(answers, targets, level), strict=True):
                        line[i] = value
        values |= {who: of} if of else {}
    return values


def scores_of(
    answered: Sequence[Answered], values: dict[str, dict[str, list[float]]], level: Level, source: str = ""
) -> Scores:
    """The scores from those of each answer, but for what only `evaluate` knows.

    ``source`` says of which data the commonest answers are.
    """
    images = [row.example for row in answered]
    bootstrap = Bootstrap(groups=images)
    models: dict[str, ModelScores] = {}
    intervals: dict[str, dict[str, Interval]] = {}
    bleu: dict[str, list[captions.BleuStats]] = {}
    asked = {who: {k: v for k, v in of.items() if k in EVERYWHERE} for who, of in values.items() if who in MODELS}
    for who, of_metric in asked.items():
        answers = [row.answer(who) for row in answered]
        bleu[who] = [captions.bleu_stats(row.answer(who), row.references, level=level) for row in answered]
        intervals[who] = dict(zip(of_metric, bootstrap.intervals(list(of_metric.values())), strict=True))
        intervals[who] |= zip(BLEU, bootstrap.bleu_intervals(bleu[who]), strict=True)
        models[who] = ModelScores(
            **{key: mean(scores) for key, scores in of_metric.items()},
            **dict(zip(BLEU, captions.bleu_from_stats(bleu[who]), strict=True)),
            mean_words=captions.mean_length(answers, level=level),
            distinct=captions.distinct_share(answers, level=level),
            repetition=mean([captions.repetition(answer, level=level) for answer in answers]),
        )
    gain: dict[str, Gain] | None = None
    if "tuned" in asked:
        pairs = [(scores, asked["tuned"][key]) for key, scores in asked["base"].items()]
        gain = dict(zip(asked["base"], bootstrap.gains(pairs), strict=True))
        gain |= zip(BLEU, bootstrap.bleu_gains(bleu["base"], bleu["tuned"]), strict=True)
    by_kind: dict[str, KindScores] = {}
    for kind in sorted({row.kind for row in answered if row.kind}):
        of_kind = [i for i, row in enumerate(answered) if row.kind == kind]
        exact, vqa = (
            {who: mean([of_metric[key][i] for i in of_kind]) for who, of_metric in asked.items()}
            for key in ("exact_match", "vqa_accuracy")
        )
        by_kind[kind] = KindScores(answers=len(of_kind), vqa_accuracy=vqa, **exact)
    return Scores(
        examples=len(set(images)),
        answers=len(answered),
        tokens=TOKENIZER_ID[level],
        reference_words=reference_words(answered, level),
        intervals=intervals,
        base=models["base"],
        tuned=models.get("tuned"),
        blanked=models.get("blanked"),
        gain=gain,
        by_kind=by_kind,
        tasks={
            task: _score_task(
                TASKS[task].metrics,
                [answered[i] for i in places],
                {who: {key: [line[i] for i in places] for key, line in of.items()} for who, of in values.items()},
                level,
                source,
            )
            for task, places in by_task(answered).items()
        },
    )


def _score_task(
    metrics: Sequence[str],
    rows: Sequence[Answered],
    values: dict[str, dict[str, list[float]]],
    level: Level,
    source: str,
) -> TaskScores:
    """Of the answers of one task alone, by its metrics."""
    words = reference_words(rows, level)
    # Of texts with fewer words than that, the longest runs of words are few or none.
    keys = [key for key in metrics if key != "bleu_4" or words >= captions.MAX_ORDER]
    who_answered = [who for who in values if all(row.has(who) for row in rows)]
    bootstrap = Bootstrap(groups=[row.example for row in rows])
    values = {who: {key: values[who][key] for key in keys if METRICS[key].per_answer} for who in who_answered}
    bleu = {
        who: [captions.bleu_stats(row.answer(who), row.references, level=level) for row in rows]
        for who in (who_answered if "bleu_4" in keys else ())
    }
    scores, intervals = {}, {}
    for who, of in values.items():
        answers = [row.answer(who) for row in rows]
        made = {key: mean(line) for key, line in of.items()}
        intervals[who] = dict(zip(of, bootstrap.intervals(list(of.values())), strict=True))
        if who in bleu:
            made["bleu_4"] = captions.bleu_from_stats(bleu[who])[-1]
            intervals[who]["bleu_4"] = bootstrap.bleu_intervals(bleu[who])[-1]
        scores[who] = {key: made[key] for key in keys} | {
            "mean_words": captions.mean_length(answers, level=level),
            "distinct": captions.distinct_share(answers, level=level),
            "repetition": mean([captions.repetition(answer, level=level) for answer in answers]),
        }
    rivals = [rival for rival in RIVALS if rival in values and "tuned" in values]
    pairs = {(rival, key): (line, values["tuned"][key]) for rival in rivals for key, line in values[rival].items()}
    gains: dict[str, dict[str, Gain]] = {rival: {} for rival in rivals}
    for (rival, key), gain in zip(pairs, bootstrap.gains(list(pairs.values())), strict=True):
        gains[rival][key] = gain
    for rival in rivals if bleu else ():
        gains[rival]["bleu_4"] = bootstrap.bleu_gains(bleu[rival], bleu["tuned"])[-1]
    guesses = [row.commonest for row in rows if row.commonest is not None] if "commonest" in values else []
    return TaskScores(
        examples=len({row.example for row in rows}),
        answers=len(rows),
        reference_words=words,
        scores=scores,
        intervals=intervals,
        gains=gains,
        types={type: _score_type(type, rows, values) for type in sorted({row.kind for row in rows if row.kind})},
        guess=commonest_of(guesses) if guesses else None,
        guess_source=source if guesses else "",
        fields=_score_fields(rows, list(values)) if "json_fields" in keys else {},
    )


def _score_fields(rows: Sequence[Answered], who_answered: Sequence[str]) -> dict[str, TypeScores]:
    """Of answers in JSON, by field: against the first reference."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        wanted = fields_of(row.references[0]) or {}
        said = {who: fields_of(row.answer(who)) for who in who_answered}
        for path in wanted:
            of = found.setdefault(re.sub(r"\[\d+\]", "[]", path), {who: [] for who in who_answered})
            for who, given in said.items():
                of[who].append(field_scores(given, wanted, path))
    names = ("json_fields", "json_anls")
    return {
        path: TypeScores(
            answers=len(of["base"]),
            scores={
                who: {name: mean(line) for name, line in zip(names, zip(*each, strict=True), strict=True)}
                for who, each in of.items()
            },
        )
        for path, of in found.items()
    }


def _score_type(type: str, rows: Sequence[Answered], values: dict[str, dict[str, list[float]]]) -> TypeScores:
    """Of the questions of one type, by the first two metrics of their task."""
    places = [i for i, row in enumerate(rows) if row.kind == type]
    of = {who: {k: [line[i] for i in places] for k, line in list(v.items())[:2]} for who, v in values.items()}
    images = [rows[i].example for i in places]
    enough = "tuned" in of and len(set(images)) >= FEW_IMAGES
    first = next(iter(of["base"]))
    rivals = [rival for rival in RIVALS if enough and rival in of]
    pairs = [(of[rival][first], of["tuned"][first]) for rival in rivals]
    gains = dict(zip(rivals, Bootstrap(groups=images).gains(pairs), strict=True))
    means = {who: {key: mean(line) for key, line in lines.items()} for who, lines in of.items()}
    return TypeScores(answers=len(places), scores=means, gains=gains)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def reference_words(answered: Sequence[Answered], level: Level) -> float:
    return captions.mean_length([text for row in answered for text in row.references], level=level)
