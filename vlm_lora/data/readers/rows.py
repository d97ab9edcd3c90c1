"""One row (a dict, wherever it came from) -> its images and dialogues. The keys tell the shape of the row:

messages        `messages: [{role, content}]`, content a text or parts; images in the parts or under `images`
conversations   `conversations: [{from, value}]` with `<image>` marks, `image` (ShareGPT, LLaVA)
query-response  `query`, `response`, `images`, perhaps `history: [[query, response], ...]` (ms-swift)
qa              an image, `question`, `answer` or `answers`, perhaps a `caption` too
captions        an image, `caption`, `captions`, `text`, ...
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vlm_lora.data.example import Dialogue, ImageRef, Turn
from vlm_lora.data.locate import Find
from vlm_lora.data.readers.gather import BadRow, Entry, Row, Rows
from vlm_lora.data.readers.prompts import filled
from vlm_lora.data.texts import is_blank
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
    "answer": ("answer", "answers", "response", "output", "multiple_choice_answer", "label"),
    "kind": ("question_type", "qtype", "kind", "answer_type"),
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
PLAIN_SYSTEM = "You are a helpful assistant."  # what the model's own chat template says where nothing is said


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

    def read_all(self, source: str, rows: Rows) -> tuple[list[Entry | BadRow], str]:
        """What all rows say, those of other shapes than the first too; and how the first one was understood.

        Raises DataError where there are no rows, or none has a shape that we know.
        """
        entries: list[Entry | BadRow] = []
        names: dict[str, None] = {}
        note = ""
        for row in rows:
            if isinstance(row, BadRow):
                entries.append(row)
                continue
            entries += self.read(row)
            if not note and isinstance(row.value, dict):
                note = self.guess(row.value)
                names |= dict.fromkeys(row.value)
        known = "; ".join(f"{name}: {what}" for name, what in SHAPES.items())
        if not entries:
            raise DataError(f"{source}: holds no rows; expected {known}")
        if not note:
            what = f"their fields are {', '.join(map(repr, list(names)[:20]))}"
            if not names and isinstance(entries[0], BadRow):
                what = f"the first one {entries[0].reason}"
            raise DataError(
                f"{source}: none of {len(entries)} rows is understood: {what}; "
                f"expected {known} (other names: --columns caption=NAME)"
            )
        return entries, note

    def read(self, row: Row) -> Iterator[Entry | BadRow]:
        """All that the row says; what is wrong with it as BadRow. Never raises."""
        fields = row.value
        try:
            if not isinstance(fields, dict):
                raise DataError(f"is not an object with named fields but {type(fields).__name__}")
            shape = self.shape or self.shape_of(fields)
            if shape is None:
                names = ", ".join(map(repr, list(fields)[:20])) or "no fields"
                raise DataError(f"has {names}; expected messages, conversations, a question or a caption")
            named = [fields[name] for name in self._names(fields, "image") if fields[name] is not None]
            images = tuple(self.find(v) for value in named for v in (value if isinstance(value, list) else [value]))
            if shape == "captions":
                dialogues = list(self._of_captions(fields, images))
            elif shape == "qa":
                dialogues = list(self._of_question_and_caption(fields, images))
            else:
                turns, images = self._of_chat(fields, shape, images)
                dialogues = [Dialogue(turns, self._kind(fields))]
            if not images:
                name = self.columns.get("image", "image, images or file_name")
                raise DataError(f"names no image under {name}; add one, or say --columns image=NAME")
            for dialogue in dialogues:
                if isinstance(dialogue, DataError):  # what is wrong with one of several captions
                    yield BadRow(row.source, row.line, str(dialogue))
                else:
                    yield images, replace(dialogue, source=row.source, line=row.line)
        except DataError as error:
            yield BadRow(row.source, row.line, str(error))

    def shape_of(self, row: dict) -> str | None:
        """The first of SHAPES whose fields the row has, or None."""
        for shape in ("messages", "conversations"):
            if isinstance(self._value(row, shape), list):
                return shape
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
        named = [(what, ", ".join(map(repr, self._names(row, what)))) for what in ("image", *parts)]
        return f"{shape}: " + ", ".join(f"{what} from {names}" for what, names in named if names)

    def _names(self, row: dict, what: str) -> list[str]:
        """The field that holds it, if there is one; of images several, "left_file_name" and "right_file_name"."""
        if what in self.columns:
            return [self.columns[what]] if self.columns[what] in row else []
        # A column that is null in this row does not hide a filled one
        filled = [name for name in NAMES[what] if row.get(name) is not None][:1]
        if what == "image" and not filled:  # the convention of Hugging Face's imagefolder
            ends = ("_file_name", "_file_names")
            filled = [name for name, value in row.items() if value is not None and str(name).endswith(ends)]
        return filled or [name for name in NAMES[what] if name in row][:1]

    def _name(self, row: dict, what: str) -> str | None:
        return next(iter(self._names(row, what)), None)

    def _caption_beside_question(self, row: dict) -> str | None:
        """`text`, `label` and the like may be anything there."""
        name = self._name(row, "caption")
        return name if "caption" in self.columns or name in ("caption", "captions") else None

    def _value(self, row: dict, what: str) -> Any:
        name = self._name(row, what)
        return None if name is None else row[name]

    def _kind(self, row: dict) -> str | None:
        value = self._value(row, "kind")
        return value if isinstance(value, str) and value.strip() else None

    def _of_captions(self, row: dict, images: tuple[ImageRef, ...]) -> Iterator[Dialogue | DataError]:
        value = self._value(row, "caption")
        captions = value if isinstance(value, list) else [value]
        if not captions:
            raise DataError("has an empty list of captions; write one, or remove the row")
        if len(captions) > 1 and len(images) > 1:  # whole columns in one object, or all about all images?
            raise DataError(f"has {len(captions)} captions, {len(images)} images; expected a row for each image")
        learnt = self._name(row, "caption")  # which the prompt must not give away
        given = {key: value for key, value in row.items() if key != learnt}
        prompt = filled(self.prompt, images[0], given) if images else self.prompt
        for caption in captions:
            try:
                yield Dialogue((Turn(prompt, text_of(caption, "caption")),), self._kind(row))
            except DataError as error:
                yield error

    def _of_question_and_caption(self, row: dict, images: tuple[ImageRef, ...]) -> Iterator[Dialogue | DataError]:
        try:
            yield self._of_question(row, len(images))
        except DataError as error:
            yield error
        name = self._caption_beside_question(row)
        if name and row[name] not in (None, "", []):
            yield from self._of_captions(row, images)

    def _of_question(self, row: dict, num_images: int) -> Dialogue:
        question = text_of(self._value(row, "question"), "question")
        if self._name(row, "question") == "instruction" and row.get("input") not in (None, ""):  # Alpaca's second half
            question += "\n" + text_of(row["input"], "input")
        _check_marks(question.count(MARK), num_images)
        answer, best = self._value(row, "answer"), row.get("multiple_choice_answer")
        if "answer" not in self.columns and isinstance(row.get("answers"), list) and row["answers"]:
            # Both: the answer to learn, and the answers of all people
            answer, best = row["answers"], answer if best is None else best
        return answered(_without_marks(question), texts_of(answer, "answer"), best, self._value(row, "kind"))

    def _of_chat(
        self, row: dict, shape: str, images: tuple[ImageRef, ...]
    ) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...]]:
        messages = _of_history(row) if shape == "query-response" else self._value(row, shape)
        if not isinstance(messages, list):
            raise DataError(f"has no list of {shape}; expected one of objects with a role and a content")
        texts: list[tuple[str, str]] = []
        inside: list = []
        for message in messages:
            role, text, named = _role_and_text(message)
            texts.append((role, text))
            inside += named
        if inside and images:
            raise DataError("names images both inside its messages and beside them; keep one of the two")
        images = images or tuple(self.find(value) for value in inside)
        _check_marks(sum(text.count(MARK) for role, text in texts if role == "user"), len(images))
        return _turns(texts), images


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
        raise DataError(f"the {what} is not valid UTF-8; save the file as UTF-8") from None
    return value


def texts_of(value: object, what: str) -> list[str]:
    """One text or a list of them, each perhaps in an object under `what` (VQAv2), at least one."""
    values = value if isinstance(value, list) and value else [None if value == [] else value]
    return [text_of(v.get(what) if isinstance(v, dict) else v, what) for v in values]


def answered(question: str, answers: list[str], best: object, kind: object) -> Dialogue:
    """The answer to learn is `best` if that is one of them, else the commonest; `accepted` keeps several."""
    if isinstance(best, int | float) and not isinstance(best, bool):  # a count, as `texts_of` writes it
        best = str(best)
    if not isinstance(best, str) or best not in answers:
        best = Counter(answers).most_common(1)[0][0]
    kind = kind if isinstance(kind, str) and kind.strip() else None
    return Dialogue((Turn(question, best),), kind, tuple(answers) if len(answers) > 1 else ())


def _check_marks(num_marks: int, num_images: int) -> None:
    # No mark at all means "in front", as TRL and ms-swift have it; any other difference is a damaged row
    if num_marks and num_marks != num_images:
        raise DataError(f"has {num_marks} {MARK} mark(s) but {num_images} image(s); make them equal")


def _of_history(row: dict) -> list[dict]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise DataError("has a history that is not a list of [query, response] pairs")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for query, response in [*history, [row.get("query"), row.get("response")]]:
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return messages


def _role_and_text(message: object) -> tuple[str, str, list]:
    """(role, text with a mark for each image, the images that are named inside)."""
    if not isinstance(message, dict):
        raise DataError("has a message that is not an object with a role and a content")
    role = message.get("role") or message.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"has a message of the role {role!r}; expected one of {', '.join(ROLES)}")
    role = ROLES[role]
    content = message["content"] if message.get("content") is not None else message.get("value")
    if not isinstance(content, list):
        return role, text_of(content, f"{role} message"), []
    text, named = "", []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text += text_of(part.get("text"), f"{role} message")
        elif kind in ("image", "image_url") and role == "user":
            value = next((part[k] for k in ("image", "path", "url", "image_url") if part.get(k)), None)
            value = value.get("url") or value if isinstance(value, dict) else value
            text += MARK
            named += [] if value is None else [value]  # without a name: the next one of `images`
        else:
            raise DataError(f"has a part {kind!r} in a {role} message; expected text, or an image of the user")
    return role, text_of(text, f"{role} message"), named


def _turns(texts: list[tuple[str, str]]) -> tuple[Turn, ...]:
    """Alternating user and assistant messages -> turns. A system message goes before the first question."""
    system = ""
    if texts and texts[0][0] == "system":
        system, texts = texts[0][1].strip(), texts[1:]
    if not texts or [role for role, _ in texts] != ["user", "assistant"] * (len(texts) // 2):
        roles = ", ".join(role for role, _ in texts) or "nobody"
        raise DataError(f"has messages of {roles}; expected user and assistant in turn, assistant last")
    turns: list[Turn] = []
    for (_, user), (_, assistant) in zip(texts[::2], texts[1::2], strict=True):
        if turns and MARK in user:
            raise DataError(f"has an image in turn {len(turns) + 1}; expected all images in the first one")
        turns.append(Turn(_without_marks(user), assistant))
    if system and system != PLAIN_SYSTEM:
        turns[0] = Turn(f"{system}\n\n{turns[0].user}", turns[0].assistant)
    return tuple(turns)


def _without_marks(text: str) -> str:
    """The question without its marks: images stand before it anyway. Between words a mark has a meaning."""
    if MARK not in text:
        return text
    parts = [part for part in text.split(MARK) if part.strip()]
    if len(parts) > 1:
        raise DataError(f"has an {MARK} between words; expected all images before or after the question")
    return text_of(parts[0].strip() if parts else None, "question")
