"""The pictures of a folder and their captions, where the command `caption` writes them: a file beside each picture, or
metadata.jsonl."""

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from vlm_lora import Caption, ImageRef
from vlm_lora.errors import DataError
from vlm_lora.inference.sinks import NotWritten, Rows, Sidecars, replace_text

METADATA = "metadata.jsonl"
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MOST_CHARACTERS = 20_000
"""Of a caption that is shown."""


class Album:
    """What is *held* of a picture is its caption file, or its line of metadata.jsonl, to the byte; None: nothing.

    Every file is read anew when it is asked for, so others may write there too.

    Raises:
        ConfigError: two pictures would share a caption file, or metadata.jsonl cannot be ours.
    """

    def __init__(self, folder: Path, rows: bool):
        self.folder, self.rows, self.lock = folder, rows, threading.Lock()
        self.look()

    def look(self) -> None:
        """Find the pictures that are there now, while others use those that were."""
        pictures: dict[str, ImageRef] = {}
        for parent, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            for path in (Path(parent, file) for file in sorted(files) if not file.startswith((".", "__"))):
                name = path.relative_to(self.folder).as_posix()
                is_text = name.encode("utf-8", "ignore").decode() == name  # else no page can show it
                if path.suffix.lower() in PICTURES and is_text and path.resolve().is_relative_to(self.folder):
                    pictures[name] = ImageRef(path=path, name=name)
        sink = self.sink(pictures.values(), None)
        self.files = sink.files if isinstance(sink, Sidecars) else {}
        self.pictures = pictures

    def sink(self, images: Iterable[ImageRef], made_with: Mapping[str, object] | None) -> Rows | Sidecars:
        """Where the command would write these pictures' captions; None: only to look whether it could."""
        paths = [image.path for image in images]
        if not self.rows:
            return Sidecars(paths)
        how = {"made_with": dict(made_with or {}), "overwrite": made_with is None}
        return Rows(paths, "metadata", self._file(""), **how)

    def captions(self, names: Iterable[str]) -> dict[str, str | None]:
        """By name; "" where there is none, None where it is no plain text of a reasonable length."""
        rows = {row.get("file_name"): row for row in map(_row, reversed(self._lines()))} if self.rows else {}
        found: dict[str, str | None] = {}
        for name in names:
            try:
                row = rows.get(name, {}) if self.rows else {"text": _read(self._file(name)) or ""}
                text: Any = row.get(_key(row), None if row else "")
                ok = len(text) <= MOST_CHARACTERS and text.encode("utf-8", "ignore").decode() == text
                found[name] = text.removeprefix("\ufeff").strip() if ok else None
            except (DataError, OSError, AttributeError, TypeError):  # a link that leads out; no text
                found[name] = None
        return found

    def save(self, name: str, text: str) -> tuple[str | None, str | None]:
        """Put this caption in place of the picture's; without a word, the caption goes. What was held, and is now."""
        text = text.strip().replace("\0", "").encode("utf-8", "replace").decode()

        def line(held: str | None) -> str:
            row = json.loads(held or "{}")
            new = json.dumps({"file_name": name} | row | {_key(row): text}, ensure_ascii=False)
            return new + "\r" * (held or "").endswith("\r")

        return self.change(name, lambda held: None if not text else line(held) if self.rows else text + "\n")

    def change(self, name: str, to: Callable[[str | None], str | None]) -> tuple[str | None, str | None]:
        """Replace what is held of a picture, and nothing else. Raises DataError where that cannot be."""
        with self.lock:
            file = self._file(name)
            try:
                lines = self._lines() if self.rows else []
                end = len(lines) - (lines[-1:] == [""])  # where a new line goes
                at = next((i for i, line in enumerate(lines) if _row(line).get("file_name") == name), end)
                before = (lines[at] if at < end else None) if self.rows else _read(file)
                after = to(before)
                if self.rows:
                    lines[at : at + 1] = ([] if after is None else [after]) + [""] * (at == end)
                if after is None and not self.rows:
                    file.unlink(missing_ok=True)
                elif after != before:
                    replace_text(file, "\n".join(lines) if self.rows else after or "")
                return before, after
            except OSError as error:
                raise DataError(f"{file.name} cannot be written ({error.strerror})") from None

    def write(self, captions: Mapping[str, Caption], made_with: Mapping[str, object]) -> list[str]:
        """Write new captions of pictures that have none. What was wrong with others, in sentences."""
        wrong = [f"{name}: {caption.error}" for name, caption in captions.items() if caption.error]
        with self.lock, closing(self.sink(map(self.pictures.__getitem__, captions), made_with)) as sink:
            there = self.captions(captions)  # a person may have written one since
            for name, caption in captions.items():
                if caption.text is not None and there[name] == "":
                    try:
                        self._file(name)
                        sink.write(self.pictures[name].path, [caption.text])
                    except (NotWritten, DataError) as error:
                        wrong.append(f"{name}: {error}")
        return wrong

    # -- inside --------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        file = self.folder / METADATA if self.rows else self.files[self.pictures[name].path]
        if not file.resolve().is_relative_to(self.folder):
            raise DataError(f"{file.name} is a link that leads out of the folder; put a file in its place")
        return file

    def _lines(self) -> list[str]:
        """Those of metadata.jsonl, blank ones too, as they are; the last is "" where the file ends its last line."""
        return (_read(self._file("")) or "").split("\n")


def _row(line: str) -> dict:
    try:
        row = json.loads(line)
        return row if isinstance(row, dict) else {}
    except ValueError:
        return {}


def _key(row: dict) -> str:
    return "text" if "text" in row or "caption" not in row else "caption"


def _read(file: Path) -> str | None:
    return file.read_bytes().decode("utf-8", "surrogateescape") if file.is_file() else None
