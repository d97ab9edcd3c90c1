"""Files of rows: JSONL, JSON, CSV/TSV, Parquet, each as an iterator of (line, row), a damaged line as BadRow.

Knows what a line is and what bytes are, not what a row means (`rows`) or where images lie. A new container (a
tar of WebDataset, a hub name) is one more such iterator, with images in the row as embedded `ImageRef`s.
"""

import csv
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from vlm_lora.data.example import ByteSource, ImageRef
from vlm_lora.data.images import content_hash
from vlm_lora.data.readers.gather import BadRow, bad_row
from vlm_lora.errors import DataError

Rows = Iterator[tuple[int | str, object] | BadRow]
"""(line, row); "row 3" for a line where several rows may stand on one."""

AT_ONCE = 8 << 20
"""Bytes of a Parquet file that are decoded together, about."""
BUFFER = 1 << 20
"""Bytes of it that are read together; without one pyarrow reads a whole row group."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def read_table(path: Path, source: str, kind: str | None = None) -> Rows:
    """Rows of `path`; `source` is its name for messages, `kind` one of SUFFIXES if its own does not tell."""
    kind = kind or path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return read_jsonl(path, source)
    if kind == ".json":
        return read_json(path, source)
    if kind in (".csv", ".tsv"):
        return read_csv(path, source)
    if kind == ".parquet":
        return read_parquet(path, source)
    raise DataError(f"{source}: {path.suffix or 'no extension'}; expected one of {', '.join(SUFFIXES)}")


def read_jsonl(path: Path, source: str) -> Rows:
    """One JSON value a line. Blank lines are no rows."""
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            if line == 1:
                _check_not_utf16(data, source)
                data = data.removeprefix(b"\xef\xbb\xbf")
            if not data.strip():
                continue
            try:
                if b"\0" in data:
                    raise ValueError("it holds a NUL byte, so the file is damaged or no text")
                yield line, json.loads(data.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield BadRow(source, line, _not_utf8(error))
            except (ValueError, RecursionError) as error:
                cut = "" if data.endswith(b"\n") else "; it is the last line: was the file cut off?"
                yield BadRow(source, line, f"is not valid JSON: {_short(error)}{cut}")


def read_json(path: Path, source: str) -> Rows:
    """A list of rows, an object with one under `data`, `rows` or `annotations`, or JSONL by another name.

    Rows come one after another, so that those in front of damage are read and each has its line. How many are
    behind it cannot be known: where the damaged one ends is what is damaged.
    """
    text = read_text(path, source)
    decoder = json.JSONDecoder()
    start = _skip(text, 0)
    if text[start : start + 1] != "[":
        yield from _read_json_object(path, source, text, start)
        return
    number, line, counted, position = 0, 1, 0, start + 1
    while True:
        position = _skip(text, position)
        new_lines = text.count("\n", counted, position)
        line, counted, number = line + new_lines, position, number + 1
        if text[position : position + 1] == "]":
            break
        where = line if new_lines or number == 1 else f"row {number}"
        try:
            value, end = decoder.raw_decode(text, position)
            yield where, value
            position = _skip(text, end)
            if text[position : position + 1] not in (",", "]"):
                raise ValueError("expected , or ] behind this row")
            position += text[position] == ","
        except (ValueError, RecursionError) as error:
            yield bad_row(f"{source}:{where}", f"is not valid JSON: {_short(error)}; nothing from here on is read")
            return
    if _skip(text, position + 1) < len(text):
        yield BadRow(source, line, "more follows behind the end of the list; nothing of it can be read")


def _read_json_object(path: Path, source: str, text: str, start: int) -> Rows:
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
        is_jsonl = _skip(text, end) < len(text)
    except (ValueError, RecursionError) as error:
        if "\n" not in text[start:].rstrip():
            raise DataError(f"{source}: is not valid JSON: {_short(error)}; repair it") from None
        is_jsonl = True  # perhaps: one row a line, the first one damaged
    if is_jsonl:
        yield from read_jsonl(path, source)
        return
    lists = [value.get(key) for key in ("data", "rows", "annotations")] if isinstance(value, dict) else []
    rows = next((found for found in lists if isinstance(found, list)), [value])  # else a single row
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row  # the lines are lost here


def read_csv(path: Path, source: str) -> Rows:
    """Rows under a header; the delimiter is what the header has most of.

    Cells of `captions` and `answers` may be JSON lists. A cell in quotes may have several lines. Where a record is
    none, as behind a stray quote, the line that it begins on is bad, and the next line begins another.
    """
    # A byte that is no UTF-8 becomes a surrogate, which makes its own row bad and no other
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        head = file.readline()
        if not head.strip():
            raise DataError(f"{source}: has no header line; expected the names of the columns")
        if "\udcff\udcfe" in head or "\udcfe\udcff" in head:
            raise DataError(f"{source}: is UTF-16; save it as UTF-8")
        file.seek(0)
        records = _Records(file, max(",;\t|", key=head.count))
        cells = records.take()
        if isinstance(cells, csv.Error):
            raise DataError(f"{source}: the header cannot be read: {cells}")
        header = [name.strip() for name in cells]
        if len(set(header)) < len(header):
            raise DataError(f"{source}: two columns have one name: {', '.join(map(repr, header))}; rename one")
        while (cells := records.take()) is not None:
            if isinstance(cells, csv.Error):
                records.give_back()
                reason = f"is not valid CSV: {cells}; is a quote not closed, or one inside the text not doubled?"
                yield BadRow(source, records.line, reason)
            elif cells and len(cells) != len(header):
                records.give_back()
                yield BadRow(source, records.line, f"has {len(cells)} cell(s), the header has {len(header)}")
            elif cells:
                row = dict(zip(header, cells, strict=True))
                yield records.line, row | {k: _list_of(row[k]) for k in ("captions", "answers") if k in row}


class _Records:
    """CSV records one after another; `line` is where the last one taken begins, from 1."""

    def __init__(self, lines: Iterable[str], delimiter: str):
        self.rest, self.delimiter, self.line = iter(lines), delimiter, 1
        self.again: deque[str] = deque()
        self.taken: list[str] = []
        self.reader = self._reader()

    def take(self) -> list[str] | csv.Error | None:
        """Its cells (none for a blank line), what is wrong with it, or None at the end."""
        self.line += len(self.taken)
        self.taken = []
        try:
            return next(self.reader, None)
        except csv.Error as error:
            return error

    def give_back(self) -> None:
        """Its lines but the first are to be taken again, as records of their own."""
        self.again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]
        self.reader = self._reader()

    def _reader(self) -> Iterator[list[str]]:
        return csv.reader(self._lines(), delimiter=self.delimiter, strict=True)

    def _lines(self) -> Iterator[str]:
        while (text := self.again.popleft() if self.again else next(self.rest, None)) is not None:
            self.taken.append(text)
            yield text


def _list_of(cell: str) -> object:
    if cell.startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass
    return cell


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
            raise DataError(f"{self.path.name}, row group {self.row_group}: cannot be read: {_short(error)}") from error
        return image_bytes(cell, self.item)


_decoding = threading.Lock()


class _Column:
    """A column of a row group, decoded forwards by the batch, of which the newest are kept; going back begins anew.

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
    try:
        file = pq.ParquetFile(path, buffer_size=BUFFER)
    except damage as error:
        raise DataError(f"{source}: is not readable as Parquet: {_short(error)}; write it again") from None
    number = 0
    with file:
        for group in range(file.num_row_groups):
            first, reason = number, "fewer rows are there than the file says"
            try:
                for batch in file.iter_batches(_rows_at_once(file, group), row_groups=[group]):
                    for values in batch.to_pylist():
                        for column, value in values.items():
                            cell = partial(ParquetCell, path, group, number - first, column)
                            values[column] = images_in(
                                value, f"{source}:{number + 1}", partial(image_in_cell, path, cell)
                            )
                        number += 1
                        yield number, values
            except damage as error:
                reason = _short(error)
            told = min(first + file.metadata.row_group(group).num_rows, path.stat().st_size)  # a damaged one says much
            while number < told:
                number += 1
                yield BadRow(source, number, f"cannot be read: {reason}; copy or download the file again")


def image_in_cell(
    place: Path, cell: Callable[[int | None], ByteSource], data: bytes, name: str, item: int | None
) -> ImageRef:
    """For `images_in`: the image is read from its cell again when it is needed."""
    return ImageRef(place, name, len(data), content_hash(data), cell(item))


def images_in(
    value: Any,
    name: str,
    make: Callable[[bytes, str, int | None], ImageRef],
    item: int | None = None,
) -> Any:
    """A cell of a table: a struct with bytes, bytes, or a list of these, as images; anything else as it is.

    Args:
        name: what an image is called that has no name of its own.
        make: gives the image for bytes, a name, and its index where the cell is a list.
    """
    if isinstance(value, list):
        return [images_in(v, f"{name}[{i}]", make, i) for i, v in enumerate(value)]
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        name, value = value.get("path") or name, value["bytes"]
    return make(value, name, item) if isinstance(value, bytes) else value


def image_bytes(cell: Any, item: int | None) -> bytes:
    """The bytes of the image that `images_in` found in such a cell."""
    cell = cell if item is None else cell[item]
    return cell["bytes"] if isinstance(cell, dict) else cell


def read_text(path: Path, source: str) -> str:
    """The file as text, without byte order mark. What is no UTF-8 becomes surrogates: `rows` finds these."""
    data = path.read_bytes()
    _check_not_utf16(data, source)
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


def decode_text(data: bytes, name: str) -> str:
    """A whole file of one text. Raises DataError where it is no UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name!r} {_not_utf8(error)}") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}); save the file as UTF-8"


def _check_not_utf16(data: bytes, source: str) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{source}: is UTF-16; save it as UTF-8")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200] or type(error).__name__
