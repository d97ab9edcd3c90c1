"""A normalised copy of a data set: the images as they are, one metadata.jsonl, cleaned texts."""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count, groupby
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from vlm_lora.data.example import Dialogue, Example, ImageRef, Turn
from vlm_lora.data.images import FORMATS, IMAGE_SUFFIXES
from vlm_lora.data.readers.rows import MARK
from vlm_lora.data.texts import clean_text
from vlm_lora.errors import DataError


def check_target(path: Path, flag: str, *, folder: bool = False) -> None:
    """Raises DataError where no file, or no `folder`, can be written at `path`: asked before hours of reading."""
    places = path.absolute().parents
    above = next(place for place in ([path, *places] if folder else places) if place.exists())
    if (path.is_dir() and not folder) or not above.is_dir() or not os.access(above, os.W_OK):
        what = "it is a folder" if above != path and path.is_dir() else f"{above} is no folder that you may write to"
        raise DataError(f"{flag} {path}: cannot be written: {what}; give another name")


def check_clean_folder(folder: Path) -> None:
    """Raises DataError where the copy would mix with what is there: asked before hours of reading, too."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"--write-clean {folder}: is there already; give a new or an empty folder")
    check_target(folder, "--write-clean", folder=True)


def write_clean(
    folder: Path,
    examples: Sequence[Example],
    prompt: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the examples so that `read_dataset(folder, prompt=prompt)` gives them again, texts cleaned.

    An image keeps its name and place; one without such (absolute, embedded in another file) is numbered.
    metadata.jsonl is written last: a copy that was stopped is not taken for a complete one.
    """
    check_clean_folder(folder)
    names: dict[ImageRef, str] = {}
    taken: set[str] = set()
    rows = []
    try:
        for done, example in enumerate(examples, start=1):
            for ref in example.images:
                if ref not in names:
                    names[ref] = _copy(ref, folder, taken)
            rows += _rows(clean_example(example), [names[ref] for ref in example.images], clean_text(prompt)[0])
            progress(done, len(examples))
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "metadata.jsonl").write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise DataError(f"--write-clean {folder}: cannot be written: {error.strerror or error}") from error


def clean_example(example: Example) -> Example:
    """The example with every text cleaned."""

    def clean_turn(turn: Turn) -> Turn:
        mark = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in turn.user)  # of private use
        pieces = clean_text(mark.join(turn.pieces))[0].split(mark)
        return replace(turn.asking(pieces), assistant=clean_text(turn.assistant)[0])

    def clean(dialogue: Dialogue) -> Dialogue:
        accepted = tuple(clean_text(text)[0] for text in dialogue.accepted)
        turns, system = tuple(map(clean_turn, dialogue.turns)), clean_text(dialogue.system)[0]
        refs = tuple(clean_text(ref)[0] for ref in dialogue.refs)
        return replace(dialogue, turns=turns, accepted=accepted, system=system, refs=refs)

    return replace(example, dialogues=tuple(clean(dialogue) for dialogue in example.dialogues))


def _rows(example: Example, names: list[str], prompt: str) -> Iterator[dict]:
    """Rows for `readers.rows`, in order; captions of one image that follow one another share one."""
    image = {"file_name": names[0]} if len(names) == 1 else {"images": names} if names else {}

    def is_caption(dialogue: Dialogue) -> bool:
        plain = not (dialogue.accepted or dialogue.has_marks)
        return len(dialogue.turns) == 1 and dialogue.turns[0].user == prompt and plain and bool(names)

    def row_of(numbered: tuple[int, Dialogue]) -> Any:
        number, dialogue = numbered
        return (dialogue.caption, _beside(dialogue)) if is_caption(dialogue) and len(names) == 1 else number

    for _, numbered in groupby(enumerate(example.dialogues), row_of):
        dialogues = [dialogue for _, dialogue in numbered]
        dialogue, first = dialogues[0], dialogues[0].turns[0]
        more = _beside(dialogue)
        if is_caption(dialogue):
            name = "label" if dialogue.caption is False else "captions"  # the name of a class is no caption
            fields = {name: [each.turns[0].assistant for each in dialogues]}
        elif dialogue.accepted:
            fields = {"question": first.user, "answers": dialogue.accepted, "multiple_choice_answer": first.assistant}
        else:
            fields = {"messages": list(_messages(dialogue))}
            more.pop("weight", None)
        yield image | fields | more


def _beside(dialogue: Dialogue) -> dict[str, Any]:
    """The fields of a row that are beside what is asked and answered."""
    weight = dialogue.turns[0].weight
    fields: dict[str, Any] = {
        "question_type": dialogue.kind,
        "system": dialogue.system or None,
        "split": dialogue.split or None,
    }
    fields["weight"] = weight if weight != 1 else None
    if dialogue.has_marks:
        boxes = dialogue.boxes
        fields["objects"] = {"ref": dialogue.refs, "bbox": [box.points for box in boxes]}
        fields["objects"] |= {"image_id": [box.image for box in boxes]} if any(box.image for box in boxes) else {}
    return {name: value for name, value in fields.items() if value is not None}


def _messages(dialogue: Dialogue) -> Iterator[dict]:
    for turn in dialogue.turns:
        yield {"role": "user", "content": MARK.join(turn.pieces)}
        answer = {"role": "assistant", "content": turn.assistant}
        yield answer if turn.weight == 1 else answer | {"weight": turn.weight}


def _copy(ref: ImageRef, folder: Path, taken: set[str]) -> str:
    data = ref.read_bytes()
    name = ref.name
    if not _is_plain(name) or name.casefold() in taken:
        suffix = "heic"  # which Pillow alone does not know
        with suppress(Exception):
            suffix = str(Image.open(io.BytesIO(data), formats=FORMATS).format).lower()
        numbered = (f"images/{number:07}.{suffix}" for number in count(len(taken) + 1))
        name = next(name for name in numbered if name not in taken)
    taken.add(name.casefold())  # A.png and a.png are one file on some systems
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return name


def _is_plain(name: str) -> bool:
    """Whether a file can have this name below any folder, on any system, and still be found as an image."""
    path = PurePosixPath(name)
    odd = set('\\:*?"<>|') & set(name) or not name.isprintable() or len(name) > 200
    if odd or str(path) != name or path.is_absolute() or path.suffix.lower() not in IMAGE_SUFFIXES:
        return False
    return not any(part.startswith((".", "__")) for part in path.parts)
