"""Base against tuned on held-out images: every question answered by both, scored, with intervals.

Both answers come from one loaded model, with the adapter switched off and on, from the same image features and by
the same greedy decoding. Intervals are bootstrapped over images, as answers about one image are not independent.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from itertools import zip_longest
from pathlib import Path
from string import ascii_uppercase
from typing import Literal, NamedTuple, Protocol

from PIL import Image

from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_PROMPT
from vlm_lora.data.example import BBOX, REF, Dialogue, Example, ImageRef
from vlm_lora.data.images import image_size, load_image
from vlm_lora.data.readers import Dataset
from vlm_lora.data.readers.prompts import filled, variables_of
from vlm_lora.errors import ConfigError, DataError
from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.captioner import Captioner, Request
from vlm_lora.inference.commonest import Commonest, commonest_of
from vlm_lora.inference.metrics import captions
from vlm_lora.inference.metrics.answers import exact_match, plain
from vlm_lora.inference.metrics.boxes import Corners, moved
from vlm_lora.inference.metrics.choices import chosen
from vlm_lora.inference.metrics.intervals import Bootstrap, Gain, Interval
from vlm_lora.inference.metrics.structured import field_scores, fields_of
from vlm_lora.inference.metrics.tokens import TOKENIZER_ID, Level, level_for
from vlm_lora.inference.scores import (
    EVERYWHERE,
    FEW_IMAGES,
    METRICS,
    MODELS,
    RIVALS,
    TASKS,
    WHO,
    FailedExample,
    KindScores,
    ModelScores,
    Scores,
    TaskScores,
    TypeScores,
    Unmoved,
)
from vlm_lora.inference.tasks import ANSWERS, BOXES, task_of
from vlm_lora.inference.team import ALONE, Team
from vlm_lora.inference.verdict import part_tables, score_table, summary
from vlm_lora.model.boxes import Frame

ROWS_AT_ONCE = 96
"""Questions decoded together."""

MOST_ROOM = 1024
"""Tokens that answers with boxes may have at most, where nothing is said of it."""

ONE_WORD = "Answer the question using a single word or phrase."
"""What LLaVA-1.5 and the benchmarks after it ask for a short answer with (Liu et al. 2023, "Improved Baselines with
Visual Instruction Tuning")."""

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

    def read(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue as the model reads and answers it, its boxes in the coordinates that it speaks in. Asked of
        dialogues with boxes alone."""
        ...

    def frame(self, width: int, height: int) -> Frame | None:
        """Where a picture of this size lies in these coordinates, if that is known."""
        ...


Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is to do."""


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


@dataclass(frozen=True, slots=True)
class Changes:
    """What tuning did to answers, as indices into `Evaluation.answered`."""

    better: list[int]
    """The largest gain first."""
    worse: list[int]
    """The largest loss first."""
    same: list[int]
    """Those that score the same."""

    def __str__(self) -> str:
        count = len(self.better) + len(self.worse) + len(self.same)
        return (
            f"Of {count:,} answers, tuning made {len(self.better):,} better and {len(self.worse):,} worse; "
            f"{len(self.same):,} score the same."
        )


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """What the models answered, and the scores."""

    answered: tuple[Answered, ...]
    """Every question, in the order of the data."""
    scores: Scores
    """Means and intervals; what ``vlm-lora eval --json`` prints."""
    values: dict[str, dict[str, list[float]]]
    """By who answered ("base", "tuned", ...) and by metric: the score of each answer, in the order of `answered`. It is
    NaN if there is no answer, or if the metric is not one of its task."""

    def __repr__(self) -> str:
        return f"<Evaluation of {self.scores.answers:,} answers. {' '.join(summary(self.scores))}>"

    def _repr_html_(self) -> str:
        """For notebooks: the verdict, and the tables of the report."""
        tables = [table for of in self.scores.tasks.values() for table in (score_table(of), *part_tables(of))]
        said = "".join(f"<p>{escape(sentence)}</p>" for sentence in summary(self.scores))
        return said + "".join(table.to_html() for table in tables)

    def write(self, folder: Path) -> None:
        """Write ``predictions.jsonl`` and ``scores.json`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for row in self.answered:
            fields = {name: getattr(row, name) for name in ("example", "question", "kind", "task", *WHO)}
            fields |= {"images": [image.name for image in row.images], "references": list(row.references)}
            fields |= {"choices": row.choices or None, "frames": row.frames or None}
            lines.append(json.dumps({k: v for k, v in fields.items() if v is not None}, ensure_ascii=False) + "\n")
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "scores.json").write_text(json.dumps(self.scores.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, examples: Sequence[Example] = ()) -> "Evaluation":
        """Read what `write` wrote. Pictures come from ``examples``; answers about other examples have none.

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
                answers = {name: row.get(name) for name in WHO} | {"task": row.get("task", "")}
                answers["choices"] = tuple(row.get("choices", ()))
                answers["frames"] = tuple(map(tuple, row.get("frames", ())))
                answered.append(
                    Answered(row["example"], images, row["question"], row.get("kind"), references, **answers)
                )
            document = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
            level = _level_of(document["tokens"])
            document.setdefault("reference_words", _reference_words(answered, level))  # came later than the others
            scores = Scores.from_json(document)
            # An earlier version wrote no task: everything was of one.
            answered = [row if row.task else replace(row, task=next(iter(scores.tasks))) for row in answered]
            return cls(tuple(answered), scores, _values(answered, level))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{folder}: holds no evaluation that can be read ({what}); run vlm-lora eval") from error

    def ranks(self, who: str) -> list[tuple[float, ...]]:
        """What each answer is ranked by: the most telling metrics of its task. For short answers these are exact match,
        then the spelling."""
        of = self.values[who]
        return [tuple(of[key][i] for key in TASKS[row.task].ranked_by) for i, row in enumerate(self.answered)]

    def changes(self) -> Changes:
        """What tuning did to each answer. Without an adapter all are in ``same``."""
        places = list(range(len(self.answered)))
        if not self.scores.tuned:
            return Changes([], [], places)
        both = zip(self.ranks("base"), self.ranks("tuned"), strict=True)
        gains = [tuple(t - b for b, t in zip(*pair, strict=True)) for pair in both]
        places.sort(key=lambda i: self._in_full(i, gains[i]), reverse=True)
        return Changes(
            better=[i for i in places if gains[i] > (0.0,) * len(gains[i])],
            worse=[i for i in reversed(places) if gains[i] < (0.0,) * len(gains[i])],
            same=[i for i in places if not any(gains[i])],
        )

    def verdict(self) -> list[str]:
        """What the scores say, in sentences."""
        return summary(self.scores)

    def still_wrong(self) -> list[int]:
        """Indices into `answered` where the tuned model is wrong: one of each mistake, the commonest mistake first;
        then the second of each. For captions and long answers: those below the mean, the lowest first."""
        if not self.scores.tuned:
            return []
        ranks, times = self.ranks("tuned"), self.mistakes()
        by_task = []
        for task, places in _by_task(self.answered).items():
            first = [ranks[i][0] for i in places]
            if TASKS[task].right_or_wrong:
                nth: Counter[tuple[str, str]] = Counter()
                order = []
                for i in places:
                    if ranks[i][0] == 0:
                        mistake = self._mistake(i)
                        order.append((nth[mistake], -times[mistake], i))
                        nth[mistake] += 1
                by_task.append([i for *_, i in sorted(order)])
            else:
                low = [i for i, rank in zip(places, first, strict=True) if rank < _mean(first)]
                by_task.append(sorted(low, key=ranks.__getitem__))
        return [i for row in zip_longest(*by_task) for i in row if i is not None]

    def mistakes(self) -> Counter[tuple[str, str]]:
        """How often each (answer of the data, answer of the model) came, where the tuned model was wrong. Captions and
        long answers do not count."""
        if not self.scores.tuned:
            return Counter()
        first, rows = [rank[0] for rank in self.ranks("tuned")], enumerate(self.answered)
        return Counter(self._mistake(i) for i, row in rows if TASKS[row.task].right_or_wrong and first[i] == 0)

    def _mistake(self, place: int) -> tuple[str, str]:
        row = self.answered[place]
        if row.choices:
            told = {letter: f"{letter}. {option}" for letter, option in zip(ascii_uppercase, row.choices, strict=False)}
            said = row.answer("tuned")
            return told[row.references[0]], told.get(chosen(said, row.choices) or "", plain(said))
        return plain(Counter(row.references).most_common(1)[0][0]), plain(row.answer("tuned"))

    def _in_full(self, place: int, gain: tuple[float, ...]) -> tuple[float, ...]:
        """A gain as a share of the most that there can be, to compare those of several tasks."""
        full = METRICS[TASKS[self.answered[place].task].ranked_by[0]].full
        return (gain[0] / full, *gain[1:])


def evaluate(  # arguments: what is asked, of whom, and who hears of it
    speaker: Speaker,
    examples: Sequence[Example] | Dataset,
    *,
    blanked: bool = False,
    swapped: bool = False,
    level: Literal["auto"] | Level = "auto",
    also: Sequence[Example] | Dataset = (),
    prompt: str | None = None,
    commonest: Commonest | None = None,
    decoding: Decoding | None = None,
    progress: Progress = lambda done, total: None,
    team: Team = ALONE,
) -> Evaluation:
    """Answer every question of every example with base and tuned model, greedily, and score both.

    Captions, questions, boxes and JSON are scored apart, each by its own metrics. The base is also asked for short
    answers with `ONE_WORD`: it may know an answer, and say it in a sentence. Dialogues of one example that ask the same
    are one question with several references, such as the five captions of a COCO image.

    Args:
        speaker: a `Captioner`. A server's model without a base beside it is scored in the base's place.
        examples: what to ask about; of a `Dataset` its test part, else its val part, else all of it.
        blanked: also ask the tuned model about plain grey images: what it still gets right, it guesses.
        swapped: as ``blanked``, and also about another example's image: how many answers stay the same.
        level: what the metrics compare: "word", "char", or "auto" (characters for Chinese and Japanese).
        also: examples of other data, scored apart: did tuning make the model forget?
        prompt: the instruction for captions. By default the captioner's own prompt, for captions that were read with
            no other one, and its system message, for rows without one.
        commonest: the commonest answers of the training data; by default those of ``examples``.
        decoding: by default greedy, with room for the longest answer with boxes.
        progress: called with the number of answers that are there, and the number of all.
        team: the processes that share the questions. Each returns the same evaluation, bit for bit.

    Raises:
        ConfigError: there are no examples; or the prompt has variables, and the data was not read with it.
        DataError: no image can be used. If some cannot, they are left out, and listed in ``scores.failed``.
    """
    wanted, examples = _asking(_part(examples), speaker, prompt)
    if not examples:
        raise ConfigError("There are no held-out examples. Give some with --val or a higher --val-split.")
    with_adapter = ["tuned", "blanked"] if blanked or swapped else ["tuned"]
    passes = ["base", *(with_adapter if speaker.tuned else [])]
    questions = [questions_about(example, wanted, speaker) for example in examples]
    given, decoding = decoding, decoding or _with_room(questions)
    asked = dict.fromkeys(passes, questions)
    short = [[question.briefly() for question in of if question.task == ANSWERS] for of in questions]
    asked |= {"one_word": short} if any(short) else {}
    answers, failed = _ask(speaker, examples, asked, decoding, progress, team)
    if len(failed) == len(examples):
        raise DataError(f"None of the {len(examples):,} held-out images can be used; the first: {failed[0]}.")
    guesses = commonest or Commonest.of(examples, wanted, "the held-out data", partial(_read, speaker))
    answered = []
    for i, example in enumerate(examples):
        if i in failed:
            continue
        said = {who: iter(of[i]) for who, of in answers.items() if i in of}
        frames = _frames(speaker, example) if any(question.task == BOXES for question in questions[i]) else ()
        for question in questions[i]:
            spoken: dict[str, str | None] = {
                who: next(texts) for who, texts in said.items() if who != "one_word" or question.task == ANSWERS
            }
            spoken["commonest"] = guesses.guess(question.task, question.kind, question.text)
            references = tuple(question.references)
            row = Answered(example.id, example.images, question.text, question.kind, references, task=question.task)
            places = frames if row.task == BOXES else ()
            answered.append(replace(row, choices=question.asked.choices, frames=places, **spoken))
    if level == "auto":
        level = level_for(text for row in answered for text in row.references)
    values = _values(answered, level)
    scores = replace(
        _score(answered, values, level, guesses.source),
        base_in_four_bits=speaker.quantised,
        failed=tuple(FailedExample(examples[i].place, failed[i]) for i in sorted(failed)),
        unmoved=_unmoved(speaker, examples, questions, answers, decoding, team) if swapped and speaker.tuned else None,
        also=evaluate(speaker, also, level=level, prompt=prompt, decoding=given, progress=progress, team=team).scores
        if _part(also)
        else None,
    )
    return Evaluation(tuple(answered), scores, values)


def _part(examples: Sequence[Example] | Dataset) -> Sequence[Example]:
    if isinstance(examples, str | Path):
        raise ConfigError(f"evaluate takes what read_dataset gives: read_dataset({str(examples)!r}).")
    return examples.part("test", "val").examples if isinstance(examples, Dataset) else examples


def _asking(examples: Sequence[Example], speaker: Speaker, given: str | None) -> tuple[str, list[Example]]:
    """The prompt, and the examples with it where their rows have no question of their own.

    If none is ``given``, it is the captioner's, which replaces only the default prompt. Then the captioner's system
    message stands where there is none.

    Raises:
        ConfigError: the prompt has variables. What they stand for, and must not give away, is known as data is read.
    """
    captioner = speaker if given is None and isinstance(speaker, Captioner) else None
    wanted, system = (captioner.prompt, captioner.system) if captioner else (given or DEFAULT_PROMPT, "")

    def asked(dialogue: Dialogue) -> Dialogue:
        if system and not dialogue.system:
            dialogue = replace(dialogue, system=system)
        if dialogue.prompt in ("", wanted) or not (given or dialogue.prompt == DEFAULT_PROMPT):
            return dialogue
        if variables_of(wanted):
            raise ConfigError(
                f"The prompt {wanted!r} has variables, which are filled in when data is read. Read it with this "
                "prompt: read_dataset(..., prompt=captioner.prompt)."
            )
        turn = replace(dialogue.turns[0], user=filled(wanted, None, {}))
        return replace(dialogue, turns=(turn,), prompt=wanted)

    return wanted, [replace(each, dialogues=tuple(map(asked, each.dialogues))) for each in examples]


def against(
    evaluation: Evaluation,
    speaker: Speaker,
    examples: Sequence[Example],
    decoding: Decoding | None = None,
    progress: Progress = lambda done, total: None,
    team: Team = ALONE,
) -> Scores:
    """The scores of an evaluation with what the speaker's adapter answers now in the place of the base: so two
    adapters are compared, on the examples that both could answer.

    ``examples`` are those that the evaluation is of; where the adapter was trained with another prompt for captions,
    with that one.

    Raises:
        DataError: there is no such example.
        ConfigError: boxes are in coordinates of several images each, and not the same of both adapters.
    """
    questions = [questions_about(example, "", speaker) for example in examples]
    decoding = decoding or _with_room(questions)
    answers, failed = _ask(speaker, examples, {"tuned": questions}, decoding, progress, team)
    said = {example.id: answers["tuned"][i] for i, example in enumerate(examples) if i not in failed}
    by_id = {example.id: example for example in examples}
    rows_of: dict[str, list[Answered]] = {}
    for row in evaluation.answered:
        rows_of.setdefault(row.example, []).append(row)
    answered = [
        replace(row, base=_as_in(row, text, speaker, by_id), blanked=None, one_word=None, commonest=None)
        for example, rows in rows_of.items()
        if len(said.get(example, ())) == len(rows)
        for row, text in zip(rows, said[example], strict=True)
    ]
    if not answered:
        raise DataError(f"None of the {len(rows_of):,} examples that one adapter answered could the other answer.")
    level = _level_of(evaluation.scores.tokens)
    return _score(answered, _values(answered, level), level)


class Question(NamedTuple):
    """A conversation of which the last turn is to be answered, and the answers that the data has for it."""

    asked: Dialogue
    kind: str | None
    references: list[str]
    prompt: str
    """The instruction for captions."""
    text: str
    """Of the last turn, as the model reads it."""
    boxes: bool
    """Whether the data answers with boxes."""

    @property
    def task(self) -> str:
        return task_of(self.asked, self.references, self.prompt, boxes=self.boxes)

    def briefly(self) -> "Question":
        """The same, and to be answered in a word; as it is where it asks for that itself."""
        last = self.asked.turns[-1]
        if re.search(r"\b(?:single|one) word\b", last.user, re.IGNORECASE):
            return self
        last = replace(last, user=f"{last.user}\n{ONE_WORD}")
        return self._replace(asked=replace(self.asked, turns=(*self.asked.turns[:-1], last)))


def questions_about(example: Example, prompt: str, speaker: Speaker) -> list[Question]:
    """What is asked about an example, dialogues that ask the same put together."""
    gathered: dict[Dialogue, Question] = {}
    for dialogue in example.dialogues:
        last, said = dialogue.turns[-1], _read(speaker, dialogue).turns[-1]
        turns = [replace(turn, weight=1.0) for turn in (*dialogue.turns[:-1], replace(last, assistant=""))]
        asked = Dialogue(
            tuple(turns),
            system=dialogue.system,
            caption=dialogue.caption,
            choices=dialogue.choices,
            # Those of the answer are the last ones, and not given away
            refs=dialogue.refs[: len(dialogue.refs) - last.assistant.count(REF)] if dialogue.refs else (),
            boxes=dialogue.boxes[: len(dialogue.boxes) - last.assistant.count(BBOX)] if dialogue.boxes else (),
        )
        new = Question(asked, dialogue.kind, [], prompt, said.user, dialogue.answers_with_boxes)
        question = gathered.setdefault(asked, new)
        question.references.extend(dialogue.accepted or (said.assistant,))
    return list(gathered.values())


def _with_room(questions: Sequence[Sequence[Question]]) -> Decoding | None:
    """Greedy decoding that cuts off no answer with boxes of the data, as a box that is cut off is a miss; None where
    there are no boxes. No token is less than a byte; those around names and boxes are beside their texts."""
    asked = (question for of_example in questions for question in of_example if question.task == BOXES)
    longest = max((len(text.encode()) for each in asked for text in each.references), default=0)
    room = min(max(DEFAULT_MAX_NEW_TOKENS, 2 * longest), MOST_ROOM)
    return Decoding(max_new_tokens=room) if longest else None


def _frames(speaker: Speaker, example: Example) -> tuple[Corners, ...]:
    """`Answered.frames`."""
    try:
        sizes = [image_size(image.read_bytes(), image.name) for image in example.images]
    except DataError:  # it was there a moment ago
        return ()
    frames = [speaker.frame(*size) for size in sizes]
    return tuple(frame[:4] for frame in frames if frame) if all(frames) else ()


def _as_in(row: Answered, text: str, speaker: Speaker, examples: Mapping[str, Example]) -> str:
    """What another adapter says in place of those of the row, its boxes in the row's coordinates: pixels of an image
    are other ones where the two see it in another size."""
    if row.task != BOXES or row.frames == (frames := _frames(speaker, examples[row.example])):
        return text
    if len(row.frames) != 1 or len(frames) != 1:
        raise ConfigError(
            f"{row.example}: the two adapters speak of boxes in other coordinates, as they see images in other sizes, "
            "and which of several images is meant is not known; compare each with its base alone."
        )
    return moved(text, frames[0], row.frames[0])


def _read(speaker: Speaker, dialogue: Dialogue) -> Dialogue:
    return speaker.read(dialogue) if dialogue.has_marks else dialogue


def _ask(
    speaker: Speaker,
    examples: Sequence[Example],
    asked_of: Mapping[str, Sequence[Sequence[Question]]],
    decoding: Decoding | None,
    progress: Progress,
    team: Team,
) -> tuple[dict[str, dict[int, list[str]]], dict[int, str]]:
    """What each of `WHO` in ``asked_of`` answers to the questions there, which are by place in examples, and what is
    wrong with images that cannot be used; by place too.

    What is decoded together is so by one process as by several: rounding, and so each answer, is the same.
    """
    answers: dict[str, dict[int, list[str]]] = {who: {} for who in asked_of}
    failed: dict[int, str] = {}
    done, total = 0, sum(len(of_example) for questions in asked_of.values() for of_example in questions)
    turn = 0
    for who, questions in asked_of.items():
        for group in _groups(questions, ROWS_AT_ONCE):
            done += sum(len(questions[i]) for i in group)
            turn += 1
            if turn % team.count != team.index:
                continue
            asked = {}
            for i in group:
                try:
                    images = [blank(image) if who == "blanked" else image for image in examples[i].images]
                    asked[i] = (images, [question.asked for question in questions[i]])
                except DataError as error:
                    failed[i] = str(error)
            texts = speaker.respond(list(asked.values()), tuned=who not in ("base", "one_word"), decoding=decoding)
            for i, text in zip(asked, texts, strict=True):
                if isinstance(text, DataError):
                    failed[i] = str(text)
                else:
                    answers[who][i] = text
            if done < total:
                progress(done, total)
    shares = team.gather((answers, failed))
    progress(total, total)  # not before all have answered
    gathered = {who: {i: text for own, _ in shares for i, text in own[who].items()} for who in asked_of}
    failures = {i: error for _, own in shares for i, error in own.items()}
    return {who: dict(sorted(of.items())) for who, of in gathered.items()}, dict(sorted(failures.items()))


def _unmoved(
    speaker: Speaker,
    examples: Sequence[Example],
    questions: Sequence[Sequence[Question]],
    answers: dict[str, dict[int, list[str]]],
    decoding: Decoding | None,
    team: Team,
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
    asked = {"tuned": [questions[i] for i in moved]}
    others, failed = _ask(speaker, shown, asked, decoding, lambda done, total: None, team)
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
        if not asked:
            continue
        if not groups or len(asked) > room:
            groups.append([])
            room = rows
        groups[-1].append(i)
        room -= len(asked)
    return groups


def blank(image: ImageRef) -> Image.Image:
    return Image.new("RGB", load_image(image).size, (128, 128, 128))


# -- scoring -------------------------------------------------------------------------------------------------


def _level_of(tokens: str) -> Level:
    """From what `Scores.tokens` calls it."""
    return next(level for level, name in TOKENIZER_ID.items() if name == tokens)


def _by_task(answered: Sequence[Answered]) -> dict[str, list[int]]:
    """The places of the answers of each task, in the order of `TASKS`."""
    places = {task: [i for i, row in enumerate(answered) if row.task == task] for task in TASKS}
    return {task: of_task for task, of_task in places.items() if of_task}


def _values(answered: Sequence[Answered], level: Level) -> dict[str, dict[str, list[float]]]:
    """`Evaluation.values`: of everybody the score of each answer, by every metric that gives one."""
    values = {}
    for who in WHO:
        of: dict[str, list[float]] = {}
        for task, of_task in _by_task(answered).items():
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


def _score(
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
            **{key: _mean(scores) for key, scores in of_metric.items()},
            **dict(zip(BLEU, captions.bleu_from_stats(bleu[who]), strict=True)),
            mean_words=captions.mean_length(answers, level=level),
            distinct=captions.distinct_share(answers, level=level),
            repetition=_mean([captions.repetition(answer, level=level) for answer in answers]),
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
            {who: _mean([of_metric[key][i] for i in of_kind]) for who, of_metric in asked.items()}
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
        tasks={
            task: _score_task(
                TASKS[task].metrics,
                [answered[i] for i in places],
                {who: {key: [line[i] for i in places] for key, line in of.items()} for who, of in values.items()},
                level,
                source,
            )
            for task, places in _by_task(answered).items()
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
    words = _reference_words(rows, level)
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
        made = {key: _mean(line) for key, line in of.items()}
        intervals[who] = dict(zip(of, bootstrap.intervals(list(of.values())), strict=True))
        if who in bleu:
            made["bleu_4"] = captions.bleu_from_stats(bleu[who])[-1]
            intervals[who]["bleu_4"] = bootstrap.bleu_intervals(bleu[who])[-1]
        scores[who] = {key: made[key] for key in keys} | {
            "mean_words": captions.mean_length(answers, level=level),
            "distinct": captions.distinct_share(answers, level=level),
            "repetition": _mean([captions.repetition(answer, level=level) for answer in answers]),
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
                who: {name: _mean(line) for name, line in zip(names, zip(*each, strict=True), strict=True)}
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
    means = {who: {key: _mean(line) for key, line in lines.items()} for who, lines in of.items()}
    return TypeScores(answers=len(places), scores=means, gains=gains)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _reference_words(answered: Sequence[Answered], level: Level) -> float:
    return captions.mean_length([text for row in answered for text in row.references], level=level)
