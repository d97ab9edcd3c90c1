"""One row (a dict, wherever it came from) -> its images and dialogues. The keys tell the shape of the row:

messages        `messages: [{role, content}]`, content a text or parts; images in the parts or under `images`;
                or `prompt` and `completion`, both such lists (TRL)
conversations   `conversations: [{from, value}]` with `<image>` marks, `image` (ShareGPT, LLaVA)
query-response  `query`, `response`, `images`, perhaps `history: [[query, response], ...]` (ms-swift)
qa              an image, `question`, `answer` or `answers`, perhaps a `caption` too, or `choices` to choose from
captions        an image, `caption`, `captions`, `text`, ..., perhaps the `prompt` that it answers

A row of any shape may have a `system` prompt, a `weight` of its loss, the `split` that it belongs to, and `objects`:
the boxes of `<bbox>` in its texts (`boxes`).
"""

import json
import math
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from string import ascii_uppercase
from typing import Any, NamedTuple

from vlm_lora.data.example import Dialogue, ImageRef, Turn
from vlm_lora.data.locate import Find
from vlm_lora.data.readers.boxes import BoxReader
from vlm_lora.data.readers.choices import letter_of, options_of, rendered
from vlm_lora.data.readers.fields import Fields, Ledger, split_of
from vlm_lora.data.readers.gather import BadRow, ClassName, Entry, Row, Rows
from vlm_lora.data.readers.prompts import filled, variables_of
from vlm_lora.data.texts import is_blank, windows_hint
from vlm_lora.errors import DataError

MAX_CHARACTERS = 1 << 20
"""Of one text: more than the longest context of the models (256 thousand tokens) holds. Tokenising takes some 200
bytes of memory for a character, so a longer text is refused before."""
SHAPES = {
    "messages": "rows {messages: [{role, content}], images}",
    "conversations": "rows {conversations: [{from, value}], image} (ShareGPT, LLaVA)",
    "query-response": "rows {query, response, images}",
    "qa": "rows {image, question, answer or answers}",
    "captions": "rows {image, caption or captions or text}",
}
MARK = "<image>"

# What people call things; the first that a row has is taken.
NAMES = {
    "image": (
        *("image", "images", "file_name", "file_names", "image_path", "image_file"),
        *("img", "img_path", "image_name", "filename", "filepath", "file", "path", "url"),
    ),
    "caption": ("caption", "captions", "text", "texts", "description", "sentences", "sentence", "comment", "label"),
    "question": ("question", "query", "instruction", "prompt"),
    "answer": ("answer", "answers", "response", "output", "completion", "multiple_choice_answer", "label"),
    "choices": ("choices", "options", "candidates"),
    "kind": ("question_type", "qtype", "kind", "answer_type"),
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "weight": ("weight",),
    "split": ("split",),
}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
ROLES |= {"system": "system", "developer": "system"}
LEARNT = ("loss", "train", "training", "weight", "loss_scale")
"""What ms-swift, axolotl and OpenAI call whether, or how much, a message is learnt."""
MAX_WEIGHT = 1000


@dataclass(frozen=True, slots=True)
class RowReader:
    """How the rows of one data set are to be read."""

    prompt: str
    """The instruction that captions answer."""
    find: Find
    columns: dict[str, str]
    """A key of NAMES -> the column of the data."""
    shape: str | None = None
    """One of SHAPES; None: each row shows its own."""
    ledger: Ledger = field(default_factory=Ledger)
    """Of the fields that nothing takes up."""
    boxes: BoxReader = field(default_factory=BoxReader)

    def read_all(self, source: str, rows: Rows) -> Generator[Entry | BadRow, None, str]:
        """What all rows say, those of other shapes than the first too. Returns how the first one was understood.

        Raises DataError, at the end, where there are no rows, or none has a shape that we know.
        """
        names: dict[str, None] = {}
        note, count, first = "", 0, None
        for row in rows:
            for entry in (row,) if isinstance(row, BadRow) else self.read(row):
                first, count = first or entry, count + 1
                yield entry
            if isinstance(row, BadRow):
                continue
            if not note and isinstance(row.value, dict):
                note = self.guess(row.value)
                names |= dict.fromkeys(row.value)
        known = "; ".join(f"{name}: {what}" for name, what in SHAPES.items())
        if not count:
            raise DataError(f"{source}: holds no rows; expected {known}")
        if not note:
            what = f"their fields are {', '.join(map(repr, list(names)[:20]))}"
            if not names and isinstance(first, BadRow):
                what = f"the first one {first.reason}"
            raise DataError(
                f"{source}: none of {count} rows is understood: {what}; "
                f"expected {known} (other names: --columns caption=NAME)"
            )
        return note

    def read(self, row: Row) -> Iterator[Entry | BadRow]:
        """All that the row says; what is wrong with it as BadRow. Never raises."""
        try:
            if not isinstance(row.value, dict):
                raise DataError(f"is not an object with named fields but {type(row.value).__name__}")
            fields = self.ledger.fields(row.value)
            shape = self.shape or self.shape_of(fields)
            if shape is None:
                names = ", ".join(map(repr, list(fields)[:20])) or "no fields"
                raise DataError(f"has {names}; expected messages, conversations, a question or a caption")
            images, dialogues = self._dialogues(fields, shape, row)
            for dialogue in dialogues:
                if isinstance(dialogue, DataError):  # what is wrong with one of several captions
                    yield BadRow(row.source, row.line, str(dialogue))
                else:
                    yield images, dialogue
        except DataError as error:
            yield BadRow(row.source, row.line, str(error))

    def _dialogues(
        self, fields: Fields, shape: str, row: Row
    ) -> tuple[tuple[ImageRef, ...], list[Dialogue | DataError]]:
        image_names = self._names(fields, "image")
        named = [value for name in image_names if (value := fields.take(name)) is not None]
        images = tuple(self.find(v) for value in named for v in (value if isinstance(value, list) else [value]))
        common = self._common(fields, row)
        if shape == "captions":
            dialogues = list(self._of_captions(fields, images))
        elif shape == "qa":
            dialogues = list(self._of_question_and_caption(fields, images))
        else:
            dialogue, images = self._of_chat(fields, shape, images)
            dialogues = [dialogue]
        if (objects := fields.take("objects")) not in (None, "", [], {}):
            dialogues = self.boxes.with_objects(dialogues, objects, images)
            for ref in (ref for each in dialogues if isinstance(each, Dialogue) for ref in each.refs):
                text_of(ref, "ref of its objects")
        self.ledger.close(fields, has_images=bool(images))
        # Words alone are learnt too, but not where an image was to be
        described = shape == "captions" or (shape == "qa" and (image_names or self._caption_beside_question(fields)))
        if not images and described:
            name = self.columns.get("image", "image, images or file_name")
            raise DataError(f"names no image under {name}; add one, or say --columns image=NAME")
        if shape == "qa" and all(isinstance(each, DataError) for each in dialogues):
            del dialogues[1:]  # one row, bad once
        return images, [d if isinstance(d, DataError) else common.of(d) for d in dialogues]

    def _common(self, fields: Fields, row: Row) -> "_Common":
        """What rows of all shapes may have."""
        system, weight, split = (self._take(fields, what) for what in ("system", "weight", "split"))
        kind = self._value(fields, "kind")
        return _Common(
            kind=str(self._take(fields, "kind")) if isinstance(kind, str | int) and str(kind).strip() else None,
            system="" if system in (None, "") else text_of(system, "system prompt").strip(),
            weight=1.0 if weight in (None, "") else weight_of(weight, "weight"),
            split="" if split in (None, "") else split_of(split),
            source=row.source,
            line=row.line,
        )

    def shape_of(self, row: dict) -> str | None:
        """The first of SHAPES whose fields the row has, or None."""
        for shape in ("messages", "conversations"):
            if isinstance(_list_in(self._value(row, shape)), list):
                return shape
        if all(isinstance(row.get(name), list) for name in ("prompt", "completion")):
            return "messages"
        if "caption" in self.columns and "question" not in self.columns:
            return "captions" if self._name(row, "caption") else None
        if "query" in row and "response" in row and "question" not in self.columns:
            return "query-response"
        question = self._name(row, "question")
        # A `question` without an answer is still one, to be reported; a `prompt` without one may be anything
        if question and (self._name(row, "answer") or question in ("question", "query")):
            return "qa"
        return "captions" if self._name(row, "caption") else None

    def guess(self, row: dict) -> str:
        """How the row is read, "captions: image from 'img', caption from 'text'"; "" where it is not."""
        shape = self.shape or self.shape_of(row)
        if shape is None:
            return ""
        parts = {"qa": ("question", "answer"), "captions": ("caption",), "query-response": ()}.get(shape, (shape,))
        if shape == "qa" and self._caption_beside_question(row):
            parts += ("caption",)
        if shape == "captions":
            parts += ("question",) if self._question_of_caption(row) else ()
        parts += tuple(what for what in ("system", "weight", "split") if self._value(row, what) not in (None, ""))
        named = [(what, ", ".join(map(repr, self._names(row, what)))) for what in ("image", *parts)]
        taken = [(what, names, self._value(row, what)) for what, names in named if names]
        classes = {True: " (the names of its classes)", False: ""}
        return f"{shape}: " + ", ".join(f"{w} from {names}{classes[isinstance(v, ClassName)]}" for w, names, v in taken)

    def _names(self, row: dict, what: str) -> list[str]:
        """The field that holds it, if there is one; of images several, "left_file_name" and "right_file_name"."""
        if what in self.columns:
            return [self.columns[what]] if self.columns[what] in row else []
        for name in NAMES[what]:  # a column that is null in this row does not hide a filled one
            if row.get(name) is not None:
                return [name]
        if what == "image":  # the convention of Hugging Face's imagefolder
            ends = ("_file_name", "_file_names")
            if filled := [name for name, value in row.items() if value is not None and str(name).endswith(ends)]:
                return filled
        return [name for name in NAMES[what] if name in row][:1]

    def _name(self, row: dict, what: str) -> str | None:
        names = self._names(row, what)
        return names[0] if names else None

    def _caption_beside_question(self, row: dict) -> str | None:
        """`text`, `label` and the like may be anything there; and the caption may be the answer itself."""
        name = self._name(row, "caption")
        if name == self._name(row, "answer"):
            return None
        return name if "caption" in self.columns or name in ("caption", "captions") else None

    def _question_of_caption(self, row: dict) -> str | None:
        """The field of the instruction that the caption answers."""
        names = (self.columns["question"],) if "question" in self.columns else ("prompt", "instruction")
        return next((name for name in names if row.get(name) not in (None, "")), None)

    def _value(self, row: dict, what: str) -> Any:
        name = self._name(row, what)
        return None if name is None else row[name]

    def _take(self, fields: Fields, what: str) -> Any:
        return fields.take(self._name(fields, what))

    def _of_captions(self, fields: Fields, images: tuple[ImageRef, ...]) -> Iterator[Dialogue | DataError]:
        learnt = self._name(fields, "caption")  # which the prompt must not give away
        value, asked = fields.take(learnt), fields.take(self._question_of_caption(fields))
        captions = value if isinstance(value, list) else [value]
        if not captions:
            raise DataError("has an empty list of captions; write one, or remove the row")
        if len(captions) > 1 and len(images) > 1:  # whole columns in one object, or all about all images?
            raise DataError(f"has {len(captions)} captions, {len(images)} images; expected a row for each image")
        if asked is not None:
            question = _question(text_of(asked, "question"), len(images))
        else:
            fields.taken.update(variables_of(self.prompt))
            given = {key: value for key, value in fields.items() if key != learnt}
            question = Turn(filled(self.prompt, images[0], given) if images else self.prompt, "")
        for caption in captions:
            # The name of a class is right or wrong, as an answer is
            is_caption = not isinstance(caption, ClassName) and (learnt != "label" or "caption" in self.columns)
            try:
                turns = (replace(question, assistant=text_of(caption, "caption")),)
                yield Dialogue(turns, caption=is_caption, prompt="" if asked is not None else self.prompt)
            except DataError as error:
                yield error

    def _of_question_and_caption(self, fields: Fields, images: tuple[ImageRef, ...]) -> Iterator[Dialogue | DataError]:
        name = self._caption_beside_question(fields)
        try:
            yield self._of_question(fields, len(images))
        except DataError as error:
            yield error
        if name and fields[name] not in (None, "", []):
            yield from self._of_captions(fields, images)

    def _of_question(self, fields: Fields, num_images: int) -> Dialogue:
        question = text_of(self._take(fields, "question"), "question")
        more = fields.take("input") if self._name(fields, "question") == "instruction" else None
        if more not in (None, ""):  # Alpaca's second half
            question += "\n" + text_of(more, "input")
        if options := self._options(fields):
            letter = letter_of(self._take(fields, "answer"), options)
            asked = _question(rendered(question, options), num_images)
            return Dialogue((replace(asked, assistant=letter),), choices=options)
        answer, best = self._take(fields, "answer"), fields.take("multiple_choice_answer")
        if "answer" not in self.columns and isinstance(fields.get("answers"), list) and fields["answers"]:
            # Both: the answer to learn, and the answers of all people
            answer, best = fields.take("answers"), answer if best is None else best
        return answered(_question(question, num_images), texts_of(answer, "answer"), best)

    def _options(self, fields: Fields) -> tuple[str, ...]:
        """What there is to choose from: a list, or a column for each letter; () if nothing."""
        name = self._name(fields, "choices")
        if name and fields[name] not in (None, "", []):
            return options_of(fields.take(name), name)
        columns = list(takewhile(lambda letter: fields.get(letter) not in (None, ""), ascii_uppercase))
        return options_of([fields.take(letter) for letter in columns], "A, B, ...") if len(columns) > 1 else ()

    def _of_chat(
        self, fields: Fields, shape: str, images: tuple[ImageRef, ...]
    ) -> tuple[Dialogue, tuple[ImageRef, ...]]:
        prompt = None
        if shape == "query-response":
            messages = _of_history(fields)
        elif self._name(fields, shape) is None and isinstance(fields.get("prompt"), list):
            prompt, messages = fields.take("prompt"), fields.take("completion")
        else:
            messages = _list_in(self._take(fields, shape))
        if not isinstance(messages, list):
            raise DataError(f"has no list of {shape}; expected one of objects with a role and a content")
        said = [_message(message, self.ledger) for message in (*(prompt or ()), *messages)]
        if prompt:  # answers in it are a part of what is asked, as TRL has it
            said[: len(prompt)] = [each._replace(weight=0.0) for each in said[: len(prompt)]]
        inside = [value for each in said for value in each.images]
        if inside and images:
            raise DataError("names images both inside its messages and beside them; keep one of the two")
        images = images or tuple(self.find(value) for value in inside)
        _check_marks(sum(each.text.count(MARK) for each in said if each.role == "user"), len(images))
        return _dialogue(said, len(images), moved=shape == "conversations"), images


class _Common(NamedTuple):
    """What rows of all shapes may have beside what is asked and answered."""

    kind: str | None
    system: str
    weight: float
    split: str
    source: str
    line: int | None

    def of(self, dialogue: Dialogue) -> Dialogue:
        if self.system and dialogue.system and self.system != dialogue.system:
            raise DataError("has a system prompt both inside its messages and beside them; keep one of the two")
        if self.weight != 1:
            turns = tuple(replace(turn, weight=turn.weight * self.weight) for turn in dialogue.turns)
            dialogue = replace(dialogue, turns=turns)
        changes = {"kind": self.kind, "split": self.split, "source": self.source, "line": self.line}
        return replace(dialogue, system=self.system or dialogue.system, **changes)


def text_of(value: object, what: str) -> str:
    """The text as it is. Raises DataError where there is none, or where it cannot be text."""
    if what == "answer" and isinstance(value, (int, float)) and not isinstance(value, bool):  # a count
        value = str(value) if isinstance(value, int) or math.isfinite(value) else None
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"has an empty {what}; write one, or remove the row")
    if not isinstance(value, str):
        raise DataError(f"the {what} is no text but {type(value).__name__}; write it as text")
    if "\0" in value:
        raise DataError(f"the {what} holds a NUL byte; the file is damaged or no text: write it again")
    if len(value) > MAX_CHARACTERS:
        raise DataError(f"the {what} has {len(value):,} characters, the limit is {MAX_CHARACTERS:,}; shorten it")
    if is_blank(value):
        raise DataError(f"the {what} is nothing but invisible characters; write one, or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"the {what} is not valid UTF-8; save the file as UTF-8{windows_hint(value)}") from None
    return value


def texts_of(value: object, what: str) -> list[str]:
    """One text or a list of them, each perhaps in an object under `what` (VQAv2), at least one."""
    values = value if isinstance(value, list) and value else [None if value == [] else value]
    return [text_of(v.get(what) if isinstance(v, dict) else v, what) for v in values]


def answered(question: Turn, answers: list[str], best: object, kind: object = None) -> Dialogue:
    """The answer to learn is `best` if that is one of them, else the commonest; `accepted` keeps several."""
    if isinstance(best, int | float) and not isinstance(best, bool):  # a count, as `texts_of` writes it
        best = str(best)
    if not isinstance(best, str) or best not in answers:
        best = Counter(answers).most_common(1)[0][0]
    kind = kind if isinstance(kind, str) and kind.strip() else None
    return Dialogue((replace(question, assistant=best),), kind, tuple(answers) if len(answers) > 1 else ())


def weight_of(value: object, name: str) -> float:
    """What a loss is multiplied by; of truth values all or nothing."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool | int | float) and math.isfinite(value) and 0 <= value <= MAX_WEIGHT:
        return float(value)
    raise DataError(
        f"its {name} is {value!r}; expected a number from 0 to {MAX_WEIGHT}, by which its loss is multiplied: "
        f"correct it, or give --ignore-columns {name} to read the rows without it"
    )


def _check_marks(num_marks: int, num_images: int) -> None:
    # No mark at all means "in front", as TRL and ms-swift have it; any other difference is a damaged row
    if num_marks and num_marks != num_images:
        raise DataError(f"has {num_marks} {MARK} mark(s) but {num_images} image(s); make them equal")


def _list_in(value: Any) -> Any:
    """A list of messages that is written as JSON, as Parquet and CSV often have it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _of_history(fields: Fields) -> list[dict]:
    history = fields.take("history") or []
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise DataError("has a history that is not a list of [query, response] pairs")
    messages: list[dict] = []
    for query, response in [*history, [fields.take("query"), fields.take("response")]]:
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return messages


class _Message(NamedTuple):
    """What one message says, with a mark for each image."""

    role: str
    text: str
    images: list
    """Those that are named inside."""
    weight: float


def _message(message: object, ledger: Ledger) -> _Message:
    if not isinstance(message, dict):
        raise DataError("has a message that is not an object with a role and a content")
    fields = ledger.fields(message)
    role = fields.take("role") or fields.take("from")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"has a message of the role {role!r}; expected one of {', '.join(ROLES)}")
    role = ROLES[role]
    content = fields.take("content") if fields.get("content") is not None else fields.take("value")
    given = {name: weight_of(fields.take(name), name) for name in LEARNT if fields.get(name) is not None}
    if role != "assistant" and any(given.values()):
        raise DataError(f"asks for the {role}'s own words to be learnt ({next(iter(given))!r}); answers alone are")
    weight = math.prod(given.values())
    parts = content if isinstance(content, list) else [content]
    text, named = "", []
    for part in parts:
        if not isinstance(part, dict):
            # All of a message may be an image, with no word to it
            text += part if isinstance(part, str) and not part.strip() else text_of(part, f"{role} message")
            continue
        part = ledger.fields(part)
        kind = part.take("type")
        if kind == "text":
            text += text_of(part.take("text"), f"{role} message")
        elif kind in ("image", "image_url") and role == "user":
            value = next((part.take(k) for k in ("image", "path", "url", "image_url") if part.get(k)), None)
            value = value.get("url") or value if isinstance(value, dict) else value
            text += MARK
            named += [] if value is None else [value]  # without a name: the next one of `images`
        else:
            raise DataError(f"has a part {kind!r} in a {role} message; expected text, or an image of the user")
        ledger.close(part, "a part of a message")
    ledger.close(fields, "a message")
    return _Message(role, text_of(text, f"{role} message"), named, weight)


def _dialogue(said: list[_Message], num_images: int, *, moved: bool) -> Dialogue:
    """Alternating user and assistant messages, perhaps after one of the system -> turns.

    `moved`: images right after the first question are before it, as LLaVA itself takes its data.
    """
    system = ""
    if said and said[0].role == "system":
        system, said = said[0].text.strip(), said[1:]
    if not said or [each.role for each in said] != ["user", "assistant"] * (len(said) // 2):
        roles = ", ".join(each.role for each in said) or "nobody"
        raise DataError(f"has messages of {roles}; expected user and assistant in turn, assistant last")
    turns = [
        replace(_placed(asked.text), assistant=answer.text, weight=answer.weight)
        for asked, answer in zip(said[::2], said[1::2], strict=True)
    ]
    first = turns[0].images
    if len(first) == num_images and (not any(first) or (moved and set(first) == {len(turns[0].user)})):
        turns[0] = replace(turns[0], images=())
    if num_images and not turns[0].user and not turns[0].images:
        text_of(None, "question")
    return Dialogue(tuple(turns), system=system)


def _question(text: str, num_images: int) -> Turn:
    """A question about images that may have marks in it."""
    _check_marks(text.count(MARK), num_images)
    turn = _placed(text)
    text_of(turn.user or None, "question")
    return replace(turn, images=turn.images if any(turn.images) else ())


def _placed(text: str) -> Turn:
    """What is asked, without its marks, and where they stood. White space at the ends, and between marks, goes."""
    if MARK not in text:
        return Turn(text, "")
    pieces = [piece if piece.strip() else "" for piece in text.split(MARK)]
    filled = [i for i, piece in enumerate(pieces) if piece]
    if filled:
        pieces[filled[0]] = pieces[filled[0]].lstrip()
        pieces[filled[-1]] = pieces[filled[-1]].rstrip()
    return Turn("", "").asking(pieces)
