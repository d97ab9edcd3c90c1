"""Rows of JSONL, JSON and CSV/TSV, each as an iterator of `Row`, a damaged line as BadRow.

Knows what a line is and what bytes are, not what a row means (`rows`) or where images lie.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_lora.data.images import IMAGE_SUFFIXES
from vlm_lora.data.origin import depend_on
from vlm_lora.data.readers.gather import BadRow, Row, Rows
from vlm_lora.data.texts import windows_hint
from vlm_lora.errors import DataError

TOKEN = re.compile(r"(\S[^\t#]*)#\d+\t")
"""What a line of Flickr's .token files begins with."""
MAX_TEXT_BYTES = 16 << 20
"""Of a file that is one text, or one row."""


def read_jsonl(path: Path, source: str) -> Rows:
    """One JSON value a line. Blank lines are no rows."""
    depend_on(path)
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
                yield Row(source, line, json.loads(data.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield BadRow(source, line, _not_utf8(error))
            except (ValueError, RecursionError) as error:
                cut = "" if data.endswith(b"\n") else "; it is the last line: was the file cut off?"
                yield BadRow(source, line, f"is not valid JSON: {first_line(error)}{cut}")


def read_json(path: Path, source: str) -> Rows:
    """A list of rows, an object with one under `data`, `rows` or `annotations`, or JSONL by another name."""
    text = read_text(path, source)
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        yield from _rows_of_list(text, start + 1, source)
        return
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        if "\n" not in text[start:].rstrip():
            raise DataError(f"{source}: is not valid JSON: {first_line(error)}; repair it") from None
        value, end = None, start  # perhaps one row a line, the first one damaged
    if _skip(text, end) < len(text):
        yield from read_jsonl(path, source)
        return
    lists = [value.get(key) for key in ("data", "rows", "annotations")] if isinstance(value, dict) else []
    rows = next((rows for rows in lists if isinstance(rows, list)), None)
    if rows is None:
        rows = _rows_by_name(value, text[start:end]) or [value]  # else a single row
    for number, row in enumerate(rows, start=1):
        yield Row(f"{source}:row {number}", None, row)  # the lines are lost here


class _Pairs(dict):
    """An object of JSON, and its `pairs` of names and values as they stand."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.pairs = pairs


def _rows_by_name(value: Any, text: str) -> list[dict]:
    """The rows of `{"a.png": "a caption"}` and of kohya's `{"path/a": {"caption": ..., "tags": ...}}`; else none.

    A name that is there twice is two rows, as an image may have two captions.
    """
    if not isinstance(value, dict) or not value:
        return []
    named = sum(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in value)
    of_kohya = all(isinstance(each, dict) and each.keys() & {"caption", "tags"} for each in value.values())
    if 2 * named <= len(value) and not of_kohya:
        return []
    pairs = json.loads(text, object_pairs_hook=_Pairs).pairs  # a dictionary keeps one of two equal names
    rows = []
    for name, said in value.items() if len(pairs) == len(value) else pairs:
        fields = dict(said) if isinstance(said, dict) else {"caption": said}
        if fields.get("caption") in (None, "") and fields.get("tags"):
            fields["caption"] = fields.pop("tags")
        rows.append({"image": name} | fields)
    return rows


def _rows_of_list(text: str, start: int, source: str) -> Rows:
    """The rows of a JSON list that begins before `start`; where several share a line, they are known by their number.

    They are read one after another, so that those before any damage are not lost and each has its line. How many
    come after it cannot be known: where the damaged one ends is what is damaged.
    """
    decoder = json.JSONDecoder()
    number, line, counted, position = 0, 1, 0, start
    while True:
        position = _skip(text, position)
        new_lines = text.count("\n", counted, position)
        line, counted, number = line + new_lines, position, number + 1
        if text[position : position + 1] == "]":
            break
        place = (source, line) if new_lines or number == 1 else (f"{source}:row {number}", None)
        try:
            value, end = decoder.raw_decode(text, position)
            yield Row(*place, value)
            position = _skip(text, end)
            if text[position : position + 1] not in (",", "]"):
                raise ValueError("expected , or ] after this row")
            position += text[position] == ","
        except (ValueError, RecursionError) as error:
            yield BadRow(*place, f"is not valid JSON: {first_line(error)}; nothing from here on is read")
            return
    if _skip(text, position + 1) < len(text):
        yield BadRow(source, line, "more follows after the end of the list; nothing of it can be read")


def read_tokens(path: Path, source: str) -> Rows:
    """Flickr8k's and Flickr30k's own file: `1000.jpg#0`, a tab, a caption; one a line."""
    depend_on(path)
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            try:
                text = decode_text(data, source).strip("\r\n")
                if not text.strip():
                    continue
                if not (match := TOKEN.match(text)):
                    raise DataError(f"is {text[:60]!r}; expected a name of an image, #, a number, a tab and a caption")
                yield Row(source, line, {"image": match[1], "caption": text[match.end() :].strip()})
            except DataError as error:
                yield BadRow(source, line, str(error))


def read_csv(path: Path, source: str) -> Rows:
    """Rows under a header; the delimiter is what the header has most of.

    Cells of `captions` and `answers` may be JSON lists. A cell in quotes may have several lines.
    """
    lines = list(io.StringIO(read_text(path, source), newline=""))
    head = lines[0] if lines else ""
    if not head.strip():
        raise DataError(f"{source}: has no header line; expected the names of the columns")
    records = _records(lines, max(",;\t|", key=head.count))
    _, cells = next(records)
    if isinstance(cells, str):
        raise DataError(f"{source}: the header {cells}")
    header = [name.strip() for name in cells]
    spaced = len(cells) > 1 and all(name.startswith(" ") for name in cells[1:])  # Flickr30k: "image| number| comment"
    if len(set(header)) < len(header):
        raise DataError(f"{source}: two columns have one name: {', '.join(map(repr, header))}; rename one")
    for line, cells in records:
        if isinstance(cells, str):
            yield BadRow(source, line, cells)
        else:
            row = dict(zip(header, map(str.strip, cells) if spaced else cells, strict=True))
            yield Row(source, line, row | {k: _list_of(row[k]) for k in ("captions", "answers") if k in row})


def _records(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """(the line that a record begins on, from 1; its cells, or what is wrong with it); blank ones are left out.

    Where there is no record, as after a stray quote, that line alone is bad, and the next line begins another.
    """
    start = width = 0
    while start < len(lines):
        reader = csv.reader(map(lines.__getitem__, range(start, len(lines))), delimiter=delimiter, strict=True)
        first, wrong = start, ""
        while not wrong:
            start = first + reader.line_num
            try:
                cells = next(reader, None)
            except csv.Error as error:
                cells = []
                wrong = f"is not valid CSV: {error}; is a quote not closed, or one inside the text not doubled?"
            if cells is None:
                return
            width = width or len(cells)
            if cells and len(cells) != width:
                wrong = f"has {len(cells)} cell(s), the header has {width}"
            if cells or wrong:
                yield start + 1, wrong or cells
        start += 1


def _list_of(cell: str) -> object:
    with suppress(ValueError, RecursionError):
        return json.loads(cell) if cell.startswith("[") else cell
    return cell


def read_text(path: Path, source: str) -> str:
    """The file as text, without byte order mark. A byte that is no UTF-8 becomes a surrogate: `rows` finds its row."""
    depend_on(path)
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
    what = f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start})"
    return f"{what}; save the file as UTF-8{windows_hint(error.object)}"


def _check_not_utf16(data: bytes, source: str) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{source}: is UTF-16; save it as UTF-8")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough for a message of ours."""
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__
