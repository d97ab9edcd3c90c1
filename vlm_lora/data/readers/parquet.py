"""Rows of Parquet. Images inside of it stay there: each is read from its cell again when it is needed."""

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from vlm_lora.data.example import ByteSource, ImageRef
from vlm_lora.data.images import content_hash
from vlm_lora.data.origin import depend_on
from vlm_lora.data.readers.gather import BadRow, ClassName, Row, Rows
from vlm_lora.data.readers.tables import first_line
from vlm_lora.errors import DataError

AT_ONCE = 8 << 20
"""Bytes of a file that are decoded together, about."""
BUFFER = 1 << 20
"""Bytes that are read together; without this pyarrow reads a whole row group."""
Cell = Callable[[str, int | None], ByteSource]
"""Where an image of one row is, by its column and its index where the cell is a list."""
Make = Callable[[str, int | None, bytes, str], ImageRef]
"""An image of one row, by its column, its index where the cell is a list, its bytes and its name."""


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """An image inside Parquet."""

    path: Path
    row_group: int
    row: int
    column: str
    item: int | None = None
    """Index where the cell is a list of images."""

    def read(self) -> bytes:
        try:
            with _decoding:  # threads that want neighbours must not each decode them
                cell = _column(self.path, self.row_group, self.column).cell(self.row)
        except (OSError, ValueError, LookupError) as error:  # pyarrow's own errors are ValueErrors
            place = f"{self.path.name}, row group {self.row_group}"
            raise DataError(f"{place}: cannot be read: {first_line(error)}") from error
        return image_bytes(cell, self.item)


_decoding = threading.Lock()


class _Column:
    """A column of a row group, decoded in batches from its beginning. The newest are kept; going back begins anew.

    A row group is 100 rows where `datasets` wrote it, and all of a file of gigabytes where others did.
    """

    def __init__(self, path: Path, row_group: int, column: str):
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(path, buffer_size=BUFFER)
        self.row_group, self.column = row_group, column
        self._begin()

    def _begin(self) -> None:
        size = _rows_at_once(self.file, self.row_group)
        self.batches = self.file.iter_batches(size, row_groups=[self.row_group], columns=[self.column])
        self.kept: deque[tuple[int, Any]] = deque(maxlen=12)  # threads are not quite in order
        self.end = 0

    def cell(self, row: int) -> Any:
        if self.kept and row < self.kept[0][0]:
            self._begin()
        while row >= self.end:
            batch = next(self.batches, None)
            if batch is None:
                raise LookupError("the row is no longer there")
            self.kept.append((self.end, batch.column(0)))
            self.end += batch.num_rows
        first, values = next((first, values) for first, values in reversed(self.kept) if first <= row)
        return values[row - first].as_py()


_column = lru_cache(maxsize=2)(_Column)


def _rows_at_once(file: Any, row_group: int) -> int:
    group = file.metadata.row_group(row_group)
    return max(1, min(1024, group.num_rows * AT_ONCE // max(1, group.total_byte_size)))


def read_parquet(path: Path, source: str) -> Rows:
    """Rows, by small batches; lines are row numbers. Cells of `{"bytes", "path"}` or bytes are ImageRefs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    damage = (pa.ArrowException, OSError, ValueError)
    depend_on(path)
    try:
        file = pq.ParquetFile(path, buffer_size=BUFFER)
    except damage as error:
        raise DataError(f"{source}: is not readable as Parquet: {first_line(error)}; write it again") from None
    number, classes = 0, class_names(_described(file))
    with file:
        for group in range(file.num_row_groups):
            first, reason = number, "fewer rows are there than the file says"
            try:
                for batch in file.iter_batches(_rows_at_once(file, group), row_groups=[group]):
                    for values in batch.to_pylist():
                        make = partial(image_in_cell, path, partial(ParquetCell, path, group, number - first))
                        number += 1
                        row = named_classes(images_in(values, f"{source}:{number}", make), classes)
                        yield Row(source, number, row)
            except damage as error:
                reason = first_line(error)
            claimed = file.metadata.row_group(group).num_rows
            claimed = min(first + claimed, path.stat().st_size)  # a damaged file may claim any number
            while number < claimed:
                number += 1
                yield BadRow(source, number, f"cannot be read: {reason}; copy or download the file again")


def image_in_cell(place: Path, cell: Cell, column: str, item: int | None, data: bytes, name: str) -> ImageRef:
    """For `images_in`, after the first two: an image that stays in its cell, in the file `place`."""
    return ImageRef(place, name, len(data), content_hash(data), cell(column, item))


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The columns that hold numbers of classes, and the names of these, of features as `datasets` describes them."""
    return {
        column: feature["names"]
        for column, each in features.items()
        if isinstance(each, dict)
        for feature in (each, each.get("feature"))
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }


def _described(file: Any) -> dict[str, Any]:
    """The features that `datasets` has described in a Parquet file."""
    with suppress(ValueError, LookupError, TypeError):
        return dict(json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"])
    return {}


def named_classes(row: dict[str, Any], classes: Mapping[str, list[str]]) -> dict[str, Any]:
    """The row with the names of its classes; -1 is none, as `datasets` has it, and another number stays one."""

    def name(value: Any, names: list[str]) -> Any:
        if isinstance(value, list):
            return [name(each, names) for each in value]
        if not isinstance(value, int) or value >= len(names):
            return value
        return ClassName(names[value]) if value >= 0 else None

    return row | {column: name(row.get(column), names) for column, names in classes.items() if column in row}


def images_in(row: dict[str, Any], name: str, make: Make) -> dict[str, Any]:
    """A row of a table, where each struct with bytes, bytes, or a list of these is an image; the rest is as it was.

    `name` is that of an image which has none of its own.
    """

    def images(value: Any, name: str, column: str, item: int | None = None) -> Any:
        if isinstance(value, list):
            return [images(v, f"{name}[{i}]", column, i) for i, v in enumerate(value)]
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            name, value = value.get("path") or name, value["bytes"]
        return make(column, item, value, name) if isinstance(value, bytes) else value

    return {column: images(value, name, column) for column, value in row.items()}


def image_bytes(cell: Any, item: int | None) -> bytes:
    """The bytes of the image that `images_in` found in such a cell."""
    cell = cell if item is None else cell[item]
    return cell["bytes"] if isinstance(cell, dict) else cell
