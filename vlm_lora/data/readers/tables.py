"""Files of rows: JSONL, JSON, CSV/TSV, Parquet, each as an iterator of (line, row), a damaged line as BadRow.

Knows what a line is and what bytes are, not what a row means (`rows`) or where images lie. A new container (a
tar of WebDataset, a hub name) is one more such iterator, with images in the row as embedded `ImageRef`s.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import content_hash
from vlm_lora.data.readers.gather import BadRow
from vlm_lora.errors import DataError

Rows = Iterator[tuple[int, object] | BadRow]

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
                yield BadRow(source, line, f"is not UTF-8 ({_at(error)}); save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                cut = "" if data.endswith(b"\n") else "; it is the last line: was the file cut off?"
                yield BadRow(source, line, f"is not valid JSON: {_short(error)}{cut}")


def read_json(path: Path, source: str) -> Rows:
    """A list of rows, an object with one under `data`, `rows` or `annotations`, or JSONL by another name.

    Rows come one after another, so that those in front of damage are read and each has its line.
    """
    text = read_text(path, source)
    decoder = json.JSONDecoder()
    start = _skip(text, 0)
    if text[start : start + 1] != "[":
        yield from _read_json_object(path, source, text, start)
        return
    line, counted, position = 1, 0, start + 1
    while True:
        position = _skip(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            break
        try:
            value, end = decoder.raw_decode(text, position)
            yield line, value
            position = _skip(text, end)
            if text[position : position + 1] not in (",", "]"):
                raise ValueError("expected , or ] behind this row")
            position += text[position] == ","
        except (ValueError, RecursionError) as error:
            yield BadRow(source, line, f"is not valid JSON: {_short(error)}; nothing from here on is read")
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
    yield from enumerate(rows, start=1)  # numbers of rows: the lines are lost here


def read_csv(path: Path, source: str) -> Rows:
    """Rows under a header; the delimiter is what the header has most of.

    Cells of `captions` and `answers` may be JSON lists.
    """
    # A byte that is no UTF-8 becomes a surrogate, which makes its own row bad and no other
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        head = file.readline()
        if not head.strip():
            raise DataError(f"{source}: has no header line; expected the names of the columns")
        if "\udcff\udcfe" in head or "\udcfe\udcff" in head:
            raise DataError(f"{source}: is UTF-16; save it as UTF-8")
        file.seek(0)
        delimiter = max(",;\t|", key=head.count)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
                if header is None:
                    header = [name.strip() for name in cells]
                    if len(set(header)) < len(header):
                        raise DataError(
                            f"{source}: two columns have one name: {', '.join(map(repr, header))}; rename one"
                        )
                elif cells and len(cells) != len(header):
                    yield BadRow(source, line, f"has {len(cells)} cell(s), the header has {len(header)}")
                elif cells:
                    row = dict(zip(header, cells, strict=True))
                    yield line, row | {k: _list_of(row[k]) for k in ("captions", "answers") if k in row}
            except StopIteration:
                return
            except csv.Error as error:
                if header is None:
                    raise DataError(f"{source}: the header cannot be read: {error}") from None
                lost = " (an open quote: nothing behind it is read)" if "end of data" in str(error) else ""
                yield BadRow(source, line, f"is not valid CSV: {error}{lost}")


def _list_of(cell: str) -> object:
    if cell.startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass
    return cell


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """An image inside Parquet. Reads its whole row group (`datasets` writes 100 rows); two are kept."""

    path: Path
    row_group: int
    row: int
    column: str
    item: int | None = None
    """Index where the cell is a list of images."""

    def read(self) -> bytes:
        try:
            cell = _column(self.path, self.row_group, self.column)[self.row].as_py()
        except (OSError, ValueError, LookupError) as error:  # pyarrow's own errors are ValueErrors
            raise DataError(f"{self.path.name}, row group {self.row_group}: cannot be read: {_short(error)}") from error
        cell = cell if self.item is None else cell[self.item]
        return cell["bytes"] if isinstance(cell, dict) else cell


@lru_cache(maxsize=2)
def _column(path: Path, row_group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=[column]).column(column)


def read_parquet(path: Path, source: str) -> Rows:
    """Rows, by small batches; lines are row numbers. Cells of `{"bytes", "path"}` or bytes are ImageRefs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                row = 0
                for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                    for values in batch.to_pylist():
                        number += 1
                        for column, value in values.items():
                            cell = ParquetCell(path, group, row, column)
                            values[column] = _embedded(value, cell, f"{source}:{number}")
                        row += 1
                        yield number, values
    except (pa.ArrowException, OSError, ValueError) as error:
        if not number:
            raise DataError(f"{source}: is not readable as Parquet: {_short(error)}; write it again") from None
        yield BadRow(source, number + 1, f"cannot be read: {_short(error)}; nothing from here on can be read")


def _embedded(value: Any, cell: ParquetCell, name: str) -> Any:
    """A struct with bytes, bytes, or a list of these, as ImageRefs; anything else as it is."""
    if isinstance(value, list):
        return [_embedded(v, replace(cell, item=i), f"{name}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        name, value = value.get("path") or name, value["bytes"]
    if not isinstance(value, bytes):
        return value
    return ImageRef(cell.path, name, len(value), content_hash(value), cell)


def read_text(path: Path, source: str) -> str:
    """The file as text, without byte order mark. What is no UTF-8 becomes surrogates: `rows` finds these."""
    data = path.read_bytes()
    _check_not_utf16(data, source)
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


def _check_not_utf16(data: bytes, source: str) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{source}: is UTF-16; save it as UTF-8")


def _at(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at position {error.start}"


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200] or type(error).__name__
