"""Data sets of the Hugging Face hub, through `datasets`: its rows, images where they lie in its cache.

No code of a data set is run: `datasets` has dropped that from version 4 on. A row that names a file of this
machine or a URL instead of holding an image is refused like any other.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import content_hash, find_image
from vlm_lora.data.readers.tables import Rows
from vlm_lora.errors import DataError

_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"({_PART}/{_PART})(?:/({_PART}))?(?::(.+))?")


@dataclass(frozen=True, slots=True)
class HubCell:
    """An image in one cell of a data set that `datasets` has loaded (and maps from its cache on disk)."""

    table: Any = field(compare=False, repr=False)
    name: str
    row: int
    column: str
    item: int | None = None
    """Index where the cell is a list of images."""

    def read(self) -> bytes:
        cell = self.table[self.row : self.row + 1].column(self.column)[0].as_py()
        cell = cell if self.item is None else cell[self.item]
        return cell["bytes"] if isinstance(cell, dict) else cell


def is_hub_name(path: str) -> bool:
    """Whether this means a data set of the hub: `hf:owner/name`, or an `owner/name` that is no local path."""
    if path.startswith("hf:"):
        return True
    return not Path(path).exists() and re.fullmatch(rf"{_PART}/{_PART}", path) is not None


def read_hub(path: str) -> tuple[str, Rows]:
    """Name for messages and rows of `[hf:]owner/name[/config][:split]`, the split being "train" if left out.

    Raises DataError where the hub cannot be reached or does not have it.
    """
    match = _NAME.fullmatch(path.removeprefix("hf:"))
    if not match:
        raise DataError(f"{path!r}: expected hf:owner/name, hf:owner/name/config or hf:owner/name:split")
    name, config, split = match.groups()
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warning of every retry; what was wrong is in the error
    try:
        table = datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # of `datasets`, `huggingface_hub`, the HTTP client, pyarrow: no common base
        reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        local = "" if path.startswith("hf:") else "there is no such folder or file, and "
        raise DataError(
            f"{path!r}: {local}the hub gave no data set {name!r}: {reason}; "
            "check the name and the network, or download it and give its folder"
        ) from None
    if not isinstance(table, datasets.Dataset):
        raise DataError(f"{path!r}: expected one split, found {', '.join(table)}; say hf:{name}:SPLIT")
    return name, _rows(table, name)


def _rows(table: Any, name: str) -> Iterator[tuple[int, object]]:
    table = table.with_format("arrow")  # as stored: an image in it is bytes, not decoded
    place = Path(table.cache_files[0]["filename"]) if table.cache_files else Path(name)
    number = 0
    for batch in table.iter(batch_size=64):
        for values in batch.to_pylist():
            for column, value in values.items():
                cell = HubCell(table, name, number, column)
                values[column] = _image(value, cell, place, f"{name}:{number + 1}")
            number += 1
            yield number, values


def _image(value: Any, cell: HubCell, place: Path, name: str) -> Any:
    """A cell of {"bytes", "path"}, of bytes, or a list of these, as ImageRefs; anything else as it is."""
    if isinstance(value, list):
        return [_image(v, replace(cell, item=i), place, f"{name}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        if value["bytes"] is None:
            return _downloaded(value["path"])
        name, value = value["path"] or name, value["bytes"]
    if not isinstance(value, bytes):
        return value
    return ImageRef(place, name, len(value), content_hash(value), cell)


def _downloaded(path: object) -> Any:
    """The file that `datasets` has downloaded; a path anywhere else stays text, which is then refused."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE):
        with suppress(DataError, OSError):
            return find_image(path, Path(folder).resolve())
    return path


def find_in_row(value: object) -> ImageRef:
    """For `rows.RowReader`: an image that the row holds. Raises DataError for a name of one."""
    if isinstance(value, ImageRef):
        return value
    raise DataError(
        f"holds no image but {type(value).__name__} {str(value)[:100]!r}, which is not fetched; "
        "expected a column of images, or download the data and give its folder"
    )
