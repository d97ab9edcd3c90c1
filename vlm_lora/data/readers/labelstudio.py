"""Label Studio's JSON export: each annotation of a task as a row, under the names that the labelling has.

The task's `data` are the row's fields; what was typed (TextArea) or chosen (Choices) is a field of the control's name.
"""

import os
from collections.abc import Iterator
from typing import Any

from vlm_lora.data.images import IMAGE_SUFFIXES
from vlm_lora.data.readers.gather import BadRow, Row, Rows
from vlm_lora.data.readers.rows import NAMES
from vlm_lora.errors import DataError

TEXTS = {"textarea": "text", "choices": "choices"}
"""The types of results that are texts, and where in their values these are."""


def flattened(rows: Rows) -> Rows:
    """The rows; in the place of a task of Label Studio those of its annotations."""
    for row in rows:
        task = row.value if isinstance(row, Row) else None
        if isinstance(task, dict) and isinstance(task.get("data"), dict) and isinstance(task.get("annotations"), list):
            yield from _annotated(row.source, row.line, task)
        else:
            yield row


def _annotated(source: str, line: int | None, task: dict) -> Iterator[Row | BadRow]:
    if not task["annotations"]:
        yield BadRow(source, line, "is a task that nobody has labelled; label it, or leave it out of the export")
    for annotation in task["annotations"]:
        try:
            yield Row(source, line, _data(task["data"]) | _labels(annotation))
        except DataError as error:
            yield BadRow(source, line, str(error))


def _data(data: dict) -> dict[str, Any]:
    """What the task is about, the image under a name of images: Label Studio's own template calls it 'captioning'."""
    if data.keys() & set(NAMES["image"]):
        return data
    named = [key for key, value in data.items() if os.path.splitext(str(value))[1].lower() in IMAGE_SUFFIXES]
    return {"image" if [key] == named else key: value for key, value in data.items()}


def _labels(annotation: object) -> dict[str, Any]:
    results = annotation.get("result") if isinstance(annotation, dict) else None
    if not isinstance(results, list) or not isinstance(annotation, dict):
        raise DataError("has an annotation without a list of results; export the tasks as JSON again")
    if annotation.get("was_cancelled"):
        raise DataError("was skipped by who labelled it; leave it out of the export")
    found: dict[str, list[str]] = {}
    for result in results:
        result = result if isinstance(result, dict) else {}
        kind, value = result.get("type"), result.get("value")
        said = value.get(TEXTS.get(str(kind), "")) if isinstance(value, dict) else None
        said = [said] if isinstance(said, str) else said
        if not isinstance(said, list) or not all(isinstance(each, str) for each in said):
            raise DataError(
                f"has a result of the type {kind!r}; expected what was typed (textarea) or chosen (choices)"
            )
        said = [", ".join(said)] if kind == "choices" else said
        found.setdefault(str(result.get("from_name")), []).extend(said)
    return {name: said[0] if len(said) == 1 else said for name, said in found.items()}
