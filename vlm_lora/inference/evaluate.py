"""Base against tuned on held-out images: every question answered by both, scored, with intervals.

Both answers come from one loaded model, with the adapter switched off and on, from the same image features and by
the same greedy decoding. Intervals are bootstrapped over images, as answers about one image are not independent.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from PIL import Image

from vlm_lora.data.example import Dialogue, Example, ImageRef
from vlm_lora.data.images import load_image
from vlm_lora.errors import ConfigError, DataError
from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.captioner import Request
from vlm_lora.inference.metrics import captions
from vlm_lora.inference.metrics.answers import exact_match
from vlm_lora.inference.metrics.intervals import Bootstrap, Gain, Interval
from vlm_lora.inference.metrics.tokens import TOKENIZER_ID, Level, level_for
from vlm_lora.inference.scores import METRICS, WHO, FailedExample, KindScores, ModelScores, Scores, Unmoved

ROWS_AT_ONCE = 96
"""Questions decoded together."""

BLEU = [f"bleu_{order}" for order in range(1, captions.MAX_ORDER + 1)]


class Speaker(Protocol):
    """What is evaluated: a `Captioner`, or a server's model (`Endpoint`)."""

    @property
    def tuned(self) -> bool:
        """Whether there is an adapter, to be compared with its base; else what there is counts as the base."""
        ...

    @property
    def quantised(self) -> bool:
        """Whether the base is in four bits."""
        ...

    def respond(
        self,
        asked: Sequence[tuple[Sequence[ImageRef | Image.Image], Sequence[Request]]],
        *,
        tuned: bool,
        decoding: Decoding | None,
    ) -> list[list[str] | DataError]:
        """The answers to several requests about each of several (lists of) images, or why there are none."""
        ...


Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is to do."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One question about one example, its references, and what each model answered.

    ``base``, ``tuned`` and ``blanked`` (tuned, shown a plain grey image of the same size) are None where not asked.
    """

    example: str
    images: tuple[ImageRef, ...]
    question: str
    kind: str | None
    references: tuple[str, ...]
    base: str | None = None
    tuned: str | None = None
    blanked: str | None = None

    def answer(self, who: str) -> str:
        """That of base, tuned or blanked, of one that was asked."""
        return getattr(self, who)


@dataclass(frozen=True, slots=True)
class Changes:
    """What tuning did to answers, as places in `Evaluation.answered`: those made better, from the largest gain on,
    those made worse, from the largest loss on, and those that score the same."""

    better: list[int]
    worse: list[int]
    same: list[int]

    def __str__(self) -> str:
        count = len(self.better) + len(self.worse) + len(self.same)
        return (
            f"Of {count:,} answers, tuning made {len(self.better):,} better and {len(self.worse):,} worse; "
            f"{len(self.same):,} score the same."
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was answered, and the scores."""

    answered: tuple[Answered, ...]
    scores: Scores
    values: dict[str, dict[str, list[float]]]
    """For each of `WHO` that was asked and each metric that has one: the score of each answer of ``answered``."""

    def write(self, folder: Path) -> None:
        """``predictions.jsonl`` and ``scores.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for row in self.answered:
            fields = {name: getattr(row, name) for name in ("example", "question", "kind", *WHO)}
            fields |= {"images": [image.name for image in row.images], "references": list(row.references)}
            lines.append(json.dumps({k: v for k, v in fields.items() if v is not None}, ensure_ascii=False) + "\n")
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "scores.json").write_text(json.dumps(self.scores.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, examples: Sequence[Example] = ()) -> "Evaluation":
        """What `write` wrote. Pictures are those of ``examples``; answers about any other example have none.

        Raises:
            DataError: a file is missing, or is not what `write` writes.
        """
        pictures = {example.id: example.images for example in examples}
        try:
            # Not splitlines: an answer may hold a line separator, which JSON does not escape.
            lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
            answered = []
            for row in map(json.loads, filter(None, lines)):
                images, references = pictures.get(row["example"], ()), tuple(row["references"])
                answers = {who: row.get(who) for who in WHO}
                answered.append(
                    Answered(row["example"], images, row["question"], row.get("kind"), references, **answers)
                )
            document = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
            levels: dict[str, Level] = {name: level for level, name in TOKENIZER_ID.items()}
            level = levels[document["tokens"]]
            document.setdefault("reference_words", _reference_words(answered, level))  # came later than the others
            scores = Scores.from_json(document)
            return cls(tuple(answered), scores, {who: _per_answer(answered, who, level) for who in scores.models})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{folder}: holds no evaluation that can be read ({what}); run vlm-lora eval") from error

    def ranks(self, who: str) -> list[tuple[float, ...]]:
        """What each answer is ranked by: CIDEr-D of captions; of short answers exact match, then the spelling."""
        names = ["cider_d"] if self.scores.of_captions else ["exact_match", "anls"]
        return list(zip(*[self.values[who][name] for name in names], strict=True))

    def changes(self) -> Changes:
        """What tuning did to each answer; everything is the same without an adapter."""
        places = list(range(len(self.answered)))
        if not self.scores.tuned:
            return Changes([], [], places)
        both = zip(self.ranks("base"), self.ranks("tuned"), strict=True)
        gains = [tuple(t - b for b, t in zip(*pair, strict=True)) for pair in both]
        places.sort(key=gains.__getitem__, reverse=True)
        zero = (0.0,) * len(gains[0])
        return Changes(
            better=[i for i in places if gains[i] > zero],
            worse=[i for i in reversed(places) if gains[i] < zero],
            same=[i for i in places if gains[i] == zero],
        )


def evaluate(  # arguments: what is asked, of whom, and who hears of it
    speaker: Speaker,
    examples: Sequence[Example],
    *,
    blanked: bool = False,
    swapped: bool = False,
    level: Literal["auto"] | Level = "auto",
    also: Sequence[Example] = (),
    decoding: Decoding | None = None,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Answer every question of every example with base and tuned model, and score both.

    Of a server that has no base beside its model, the scores are that model's alone, in the base's place.

    Dialogues of one example that ask the same are one question with several references (a COCO image's five captions).
    An example with an image that cannot be used is left out, and named in the scores.

    Args:
        blanked: also answer with the tuned model and a plain grey image in each image's place: what the answer owes to
            the picture is the difference.
        swapped: the same, and with another example's image there: how many answers stay the same.
        level: what the metrics compare, words or characters; ``auto`` is characters for Chinese and Japanese.
        also: examples of something else, a check of what tuning made the model forget: their scores are apart.
        progress: called with the number of passes over a question done and their total.
    """
    if not examples:
        raise ConfigError(
            "There are no held-out examples to evaluate on. Give some with --val or a higher --val-split."
        )
    with_adapter = ["tuned", "blanked"] if blanked or swapped else ["tuned"]
    passes = ["base", *(with_adapter if speaker.tuned else [])]
    questions = [_questions(example) for example in examples]
    answers, failed = _ask(speaker, examples, questions, passes, decoding, progress)
    if len(failed) == len(examples):
        raise DataError(f"None of the {len(examples):,} held-out images can be used; the first: {failed[0]}.")
    answered = [
        Answered(
            example.id,
            example.images,
            question.asked.turns[-1].user,
            question.kind,
            tuple(question.references),
            **{who: answers[who][i][q] for who in passes},
        )
        for i, example in enumerate(examples)
        if i not in failed
        for q, question in enumerate(questions[i])
    ]
    if level == "auto":
        level = level_for(text for row in answered for text in row.references)
    values = {who: _per_answer(answered, who, level) for who in passes}
    scores = replace(
        _score(answered, values, level),
        base_in_four_bits=speaker.quantised,
        failed=tuple(FailedExample(examples[i].place, failed[i]) for i in sorted(failed)),
        unmoved=_unmoved(speaker, examples, questions, answers, decoding) if swapped and speaker.tuned else None,
        also=evaluate(speaker, also, level=level, decoding=decoding, progress=progress).scores if also else None,
    )
    return Evaluation(tuple(answered), scores, values)


def against(
    evaluation: Evaluation,
    speaker: Speaker,
    examples: Sequence[Example],
    decoding: Decoding | None = None,
    progress: Progress = lambda done, total: None,
) -> Scores:
    """The scores of an evaluation with what the speaker's adapter answers now in the place of the base: so two
    adapters are compared.

    ``examples`` are those that the evaluation is of.
    """
    questions = [_questions(example) for example in examples]
    answers, failed = _ask(speaker, examples, questions, ["tuned"], decoding, progress)
    texts = [text for i in range(len(examples)) if i not in failed for text in answers["tuned"][i]]
    answered = [replace(row, base=text) for row, text in zip(evaluation.answered, texts, strict=True)]
    levels: dict[str, Level] = {name: level for level, name in TOKENIZER_ID.items()}
    level = levels[evaluation.scores.tokens]
    values = {"base": _per_answer(answered, "base", level), "tuned": evaluation.values["tuned"]}
    return _score(answered, values, level)


class Question(NamedTuple):
    """A conversation of which the last turn is to be answered, and the answers that the data has for it."""

    asked: Dialogue
    kind: str | None
    references: list[str]


def _questions(example: Example) -> list[Question]:
    """What is asked about an example, dialogues that ask the same put together."""
    gathered: dict[Dialogue, Question] = {}
    for dialogue in example.dialogues:
        last = dialogue.turns[-1]
        turns = [replace(turn, weight=1.0) for turn in (*dialogue.turns[:-1], replace(last, assistant=""))]
        asked = Dialogue(tuple(turns), system=dialogue.system)
        question = gathered.setdefault(asked, Question(asked, dialogue.kind, []))
        question.references.extend(dialogue.accepted or (last.assistant,))
    return list(gathered.values())


def _ask(
    speaker: Speaker,
    examples: Sequence[Example],
    questions: Sequence[Sequence[Question]],
    passes: Sequence[str],
    decoding: Decoding | None,
    progress: Progress,
) -> tuple[dict[str, dict[int, list[str]]], dict[int, str]]:
    """What base, tuned and blanked answer, and what is wrong with images that cannot be used; by place in examples."""
    answers: dict[str, dict[int, list[str]]] = {who: {} for who in passes}
    failed: dict[int, str] = {}
    done, total = 0, len(passes) * sum(map(len, questions))
    for who in passes:
        for group in _groups(questions, ROWS_AT_ONCE):
            asked = {}
            for i in group:
                try:
                    images = [blank(image) if who == "blanked" else image for image in examples[i].images]
                    asked[i] = (images, [question.asked for question in questions[i]])
                except DataError as error:
                    failed[i] = str(error)
                done += len(questions[i])
            texts = speaker.respond(list(asked.values()), tuned=who != "base", decoding=decoding)
            for i, text in zip(asked, texts, strict=True):
                if isinstance(text, DataError):
                    failed[i] = str(text)
                else:
                    answers[who][i] = text
            progress(done, total)
    return answers, failed


def _unmoved(
    speaker: Speaker,
    examples: Sequence[Example],
    questions: Sequence[Sequence[Question]],
    answers: dict[str, dict[int, list[str]]],
    decoding: Decoding | None,
) -> dict[str, Unmoved]:
    """How many of the tuned model's answers stay the same without their picture: ``blanked``, and ``other``, with that
    of the next example that has as many."""
    tuned = answers["tuned"]
    seen = [i for i in tuned if i in answers["blanked"] and examples[i].images]
    partner = {}
    for place, i in enumerate(seen):
        later = (*seen[place + 1 :], *seen[:place])
        partner[i] = next((j for j in later if len(examples[j].images) == len(examples[i].images)), None)
    moved = [i for i in seen if partner[i] is not None]
    shown = [replace(examples[i], images=examples[partner[i]].images) for i in moved]
    others, failed = _ask(speaker, shown, [questions[i] for i in moved], ["tuned"], decoding, lambda done, total: None)
    other = {i: others["tuned"][place] for place, i in enumerate(moved) if place not in failed}
    told = {}
    for who, texts in (("blanked", answers["blanked"]), ("other", other)):
        pairs = [(i, a, b) for i in seen if i in texts for a, b in zip(tuned[i], texts[i], strict=True)]
        if pairs:
            same = [exact_match(b, [a]) for _, a, b in pairs]
            told[who] = Unmoved(_mean(same), *Bootstrap(groups=[str(i) for i, _, _ in pairs]).interval(same))
    return told


def _groups(questions: Sequence[Sequence], rows: int) -> list[list[int]]:
    """Indices of examples in order, gathered while their questions are at most ``rows``."""
    groups: list[list[int]] = []
    room = 0
    for i, asked in enumerate(questions):
        if not groups or len(asked) > room:
            groups.append([])
            room = rows
        groups[-1].append(i)
        room -= len(asked)
    return groups


def blank(image: ImageRef) -> Image.Image:
    return Image.new("RGB", load_image(image).size, (128, 128, 128))


# -- scoring -------------------------------------------------------------------------------------------------


def _per_answer(answered: Sequence[Answered], who: str, level: Level) -> dict[str, list[float]]:
    """The score of each answer, by every metric that gives one."""
    answers, references = [row.answer(who) for row in answered], [row.references for row in answered]
    return {key: metric.per_answer(answers, references, level) for key, metric in METRICS.items() if metric.per_answer}


def _score(answered: Sequence[Answered], values: dict[str, dict[str, list[float]]], level: Level) -> Scores:
    """The scores over all answers, from those of each; but for what only `evaluate` knows."""
    images = [row.example for row in answered]
    bootstrap = Bootstrap(groups=images)
    models: dict[str, ModelScores] = {}
    intervals: dict[str, dict[str, Interval]] = {}
    bleu: dict[str, list[captions.BleuStats]] = {}
    for who, of_metric in values.items():
        answers = [row.answer(who) for row in answered]
        bleu[who] = [captions.bleu_stats(row.answer(who), row.references, level=level) for row in answered]
        intervals[who] = {key: bootstrap.interval(scores) for key, scores in of_metric.items()}
        intervals[who] |= zip(BLEU, bootstrap.bleu_intervals(bleu[who]), strict=True)
        models[who] = ModelScores(
            **{key: _mean(scores) for key, scores in of_metric.items()},
            **dict(zip(BLEU, captions.bleu_from_stats(bleu[who]), strict=True)),
            mean_words=captions.mean_length(answers, level=level),
            distinct=captions.distinct_share(answers, level=level),
            repetition=_mean([captions.repetition(answer, level=level) for answer in answers]),
        )
    gain: dict[str, Gain] | None = None
    if "tuned" in values:
        gain = {key: bootstrap.gain(scores, values["tuned"][key]) for key, scores in values["base"].items()}
        gain |= zip(BLEU, bootstrap.bleu_gains(bleu["base"], bleu["tuned"]), strict=True)
    by_kind: dict[str, KindScores] = {}
    for kind in sorted({row.kind for row in answered if row.kind}):
        of_kind = [i for i, row in enumerate(answered) if row.kind == kind]
        exact, vqa = (
            {who: _mean([of_metric[key][i] for i in of_kind]) for who, of_metric in values.items()}
            for key in ("exact_match", "vqa_accuracy")
        )
        by_kind[kind] = KindScores(answers=len(of_kind), vqa_accuracy=vqa, **exact)
    return Scores(
        examples=len(set(images)),
        answers=len(answered),
        tokens=TOKENIZER_ID[level],
        reference_words=_reference_words(answered, level),
        intervals=intervals,
        base=models["base"],
        tuned=models.get("tuned"),
        blanked=models.get("blanked"),
        gain=gain,
        by_kind=by_kind,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _reference_words(answered: Sequence[Answered], level: Level) -> float:
    return captions.mean_length([text for row in answered for text in row.references], level=level)
