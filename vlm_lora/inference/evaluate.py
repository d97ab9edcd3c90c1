"""Base against tuned on held-out images: every question, answered by both.

Both answers come from one loaded model, with the adapter switched off and on, from the same image features and by
the same greedy decoding. Intervals are bootstrapped over images, as answers about one image are not independent.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
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
from vlm_lora.inference.commonest import Commonest
from vlm_lora.inference.evaluation import Evaluation
from vlm_lora.inference.metrics.answers import exact_match
from vlm_lora.inference.metrics.boxes import Corners, moved
from vlm_lora.inference.metrics.intervals import Bootstrap
from vlm_lora.inference.metrics.tokens import Level, level_for
from vlm_lora.inference.scores import (
    FailedExample,
    Scores,
    Unmoved,
)
from vlm_lora.inference.scoring import Answered, level_of, mean, scores_of, values_of
from vlm_lora.inference.tasks import ANSWERS, BOXES, task_of
from vlm_lora.inference.team import ALONE, Team
from vlm_lora.model.boxes import Frame

ROWS_AT_ONCE = 96
"""Questions decoded together."""

MOST_ROOM = 1024
"""Tokens that answers with boxes may have at most, where nothing is said of it."""

ONE_WORD = "Answer the question using a single word or phrase."
"""What LLaVA-1.5 and the benchmarks after it ask for a short answer with (Liu et al. 2023, "Improved Baselines with
Visual Instruction Tuning")."""


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
    values = values_of(answered, level)
    scores = replace(
        scores_of(answered, values, level, guesses.source),
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
    level = level_of(evaluation.scores.tokens)
    return scores_of(answered, values_of(answered, level), level)


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
            told[who] = Unmoved(mean(same), *Bootstrap(groups=[str(i) for i, _, _ in pairs]).interval(same))
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
