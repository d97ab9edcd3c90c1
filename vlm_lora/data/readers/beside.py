"""A prompt with variables for an image that stands in no data: its columns are those of a metadata file around it."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from vlm_lora.data.example import ImageRef
from vlm_lora.data.readers.detect import METADATA, READERS
from vlm_lora.data.readers.prompts import filled, variables_of


def prompt_for(prompt: str, image: object) -> str:
    """The prompt for one image, as `prompts.filled` has it; one that is no `ImageRef` comes from no file.

    Raises:
        DataError: the image has no value for a variable; the message names it.
    """
    if not variables_of(prompt):
        return filled(prompt, None, {})
    ref = image if isinstance(image, ImageRef) else None
    return filled(prompt, ref, _row_beside(ref) if ref else {})


def _row_beside(image: ImageRef) -> Mapping:
    """The image's row in the nearest metadata file that names it."""
    if image.embedded:
        return {}
    path = Path(os.path.abspath(image.path))
    for folder in path.parents:
        row = _rows_in(folder).get(path.relative_to(folder).as_posix())
        if row is not None:
            return row
    return {}


def _rows_in(folder: Path) -> dict[str, Mapping]:
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    return _read(tuple((file, file.stat().st_mtime_ns) for file in files)) if files else {}


@lru_cache(maxsize=16)
def _read(files: tuple[tuple[Path, int], ...]) -> dict[str, Mapping]:
    """The columns of each image that the files name, as long as they stay as they are."""
    rows: dict[str, Mapping] = {}
    for file, _ in files:
        for row in READERS[file.suffix](file, file.name):
            fields = getattr(row, "value", None)
            if isinstance(fields, dict) and isinstance(fields.get("file_name"), str):
                rows.setdefault(fields["file_name"], fields)
    return rows
