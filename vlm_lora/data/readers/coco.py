"""COCO captions (`images`, `annotations`) and VQAv2 (a file of questions, one of annotations)."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from vlm_lora.data.example import Dialogue, ImageRef, Turn
from vlm_lora.data.locate import Find
from vlm_lora.data.readers.fields import Ledger
from vlm_lora.data.readers.gather import BadRow, Entry
from vlm_lora.data.readers.prompts import filled, variables_of
from vlm_lora.data.readers.rows import answered, text_of, texts_of
from vlm_lora.errors import DataError

OF_IMAGES = ("id", "file_name", "width", "height", "license", "flickr_url", "coco_url", "date_captured")
"""What COCO's format says of an image; nothing of it is to be learnt."""
OF_ANSWERS = ("question_id", "image_id", "answer_type")


def is_coco(data: object) -> TypeGuard[dict]:
    """Whether a JSON value has the lists of a COCO file, of whatever task."""
    return isinstance(data, dict) and all(isinstance(data.get(key), list) for key in ("images", "annotations"))


def is_questions(data: object) -> TypeGuard[dict]:
    """Whether a JSON value is VQAv2's file of questions."""
    return isinstance(data, dict) and isinstance(data.get("questions"), list)


def is_answers(data: object) -> TypeGuard[dict]:
    """Whether a JSON value is VQAv2's file of annotations."""
    rows = data.get("annotations") if isinstance(data, dict) and "images" not in data else None
    return isinstance(rows, list) and any(isinstance(row, dict) and "question_id" in row for row in rows[:10])


def read_coco(data: dict, source: str, prompt: str, find: Find, ledger: Ledger) -> Iterator[Entry | BadRow]:
    """A dialogue for each caption. BadRows too: an image without captions, a caption without its image.

    Raises DataError for a COCO file of another task.
    """
    annotations = data["annotations"]
    if annotations and not any(isinstance(a, dict) and "caption" in a for a in annotations):
        raise DataError(f"{source}: is COCO without captions; expected captions_... and not instances_...")
    images: dict[Any, dict] = {}
    for number, image in enumerate(data["images"], start=1):
        if not isinstance(image, dict) or not _is_id(image.get("id")) or "file_name" not in image:
            yield BadRow(source, None, f"image {number} of the list has no id or no file_name")
        elif image["id"] in images:
            yield BadRow(source, None, f"image {number} of the list has an id taken before: {image['id']!r}")
        else:
            images[image["id"]] = image
            known = (*OF_IMAGES, *variables_of(prompt))
            ledger.close(ledger.fields({k: v for k, v in image.items() if k not in known}))
    captioned = set()
    for number, annotation in enumerate(annotations, start=1):
        where = f"annotation {number}"
        try:
            if not isinstance(annotation, dict):
                raise DataError("is no object with an image_id and a caption")
            where += f" (id {annotation['id']!r})" if "id" in annotation else ""
            image_id = annotation.get("image_id")
            if not _is_id(image_id) or image_id not in images:
                raise DataError(f"is about the image {image_id!r}, which is not in the list of images")
            captioned.add(image_id)
            fields = ledger.fields({k: v for k, v in annotation.items() if k not in ("id", "image_id")})
            fields.taken.update(variables_of(prompt))
            caption = text_of(fields.take("caption"), "caption")
            ledger.close(fields)
            ref = find(images[image_id]["file_name"])
            row = images[image_id] | {key: value for key, value in annotation.items() if key != "caption"}
            asked = filled(prompt, ref, row)
            yield (ref,), Dialogue((Turn(asked, caption),), caption=True, prompt=prompt, source=f"{source}:{where}")
        except DataError as error:
            yield BadRow(source, None, f"{where}: {error}")
    for image_id, image in images.items():
        if image_id not in captioned:
            yield BadRow(source, None, f"image {image['file_name']!r} (id {image_id!r}) has no caption")


def read_vqa(questions: dict, answers: dict, source: str, find: Find, ledger: Ledger) -> Iterator[Entry | BadRow]:
    """A dialogue for each question, human answers in `accepted`. BadRows too: either one without the other.

    The image is what the question names, or `COCO_<data_subtype>_<image_id, 12 digits>.jpg`.
    """
    by_question: dict[Any, dict] = {}
    for number, row in enumerate(answers["annotations"], start=1):
        if not isinstance(row, dict) or not _is_id(row.get("question_id")):
            yield BadRow(source, None, f"annotation {number} has no question_id")
        elif row["question_id"] in by_question:
            yield BadRow(source, None, f"annotation {number} is a second one of question {row['question_id']!r}")
        else:
            by_question[row["question_id"]] = row
    subset = questions.get("data_subtype") or answers.get("data_subtype")
    for number, row in enumerate(questions["questions"], start=1):
        where = f"question {number}"
        try:
            if not isinstance(row, dict) or not _is_id(row.get("question_id")):
                raise DataError("has no question_id")
            where += f" (id {row['question_id']!r})"
            annotation = by_question.pop(row["question_id"], None)
            if annotation is None:
                raise DataError("has no annotation; test sets have none, use train or val")
            said = ledger.fields({k: v for k, v in annotation.items() if k not in OF_ANSWERS})
            best = said.take("multiple_choice_answer")
            given = texts_of(said.take("answers") or best, "answer")
            asked = ledger.fields({k: v for k, v in row.items() if k not in ("question_id", "image_id", "image")})
            question = Turn(text_of(asked.take("question"), "question"), "")
            dialogue = answered(question, given, best, said.take("question_type"))
            ledger.close(said)
            ledger.close(asked)
            ref = find(row["image"]) if "image" in row else _find_by_id(row.get("image_id"), subset, find)
            yield (ref,), replace(dialogue, source=f"{source}:{where}")
        except DataError as error:
            yield BadRow(source, None, f"{where}: {error}")
    for question_id in by_question:
        yield BadRow(source, None, f"the annotation of question {question_id!r} has no question")


def _find_by_id(image_id: object, subset: object, find: Find) -> ImageRef:
    if not _is_id(image_id):
        raise DataError(f"has the image_id {image_id!r}; expected a number")
    names = [f"{image_id}.jpg", f"{image_id}.png", f"{image_id}.jpeg", str(image_id)]
    if isinstance(image_id, int):
        names = [f"COCO_{subset}_{image_id:012d}.jpg", f"{image_id:012d}.jpg", *names]
    for name in names[1:]:
        with suppress(DataError):
            return find(name)
    return find(names[0])  # VQAv2's own name last, so that it is the one in the message


def find_partner(path: Path, candidates: list[Path]) -> Path | None:
    """VQAv2's other file: of the same set (train2014), and with most words (v2, mscoco) of its name."""
    wanted = "annotation" if "question" in path.stem.lower() else "question"
    words = _words(path)
    subset = {word for word in words if word.startswith(("train", "val", "test"))}
    others = [c for c in candidates if wanted in c.stem.lower() and subset <= _words(c)]
    return max(others, key=lambda c: (len(words & _words(c)), c.name), default=None)


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", path.stem.lower()))


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)
