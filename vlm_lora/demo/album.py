"""The pictures of a folder and their captions, where the command `caption` writes them: a file beside each picture, or
metadata.jsonl."""

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path

from vlm_lora import Caption, ImageRef
from vlm_lora.demo.uploads import PICTURES
from vlm_lora.errors import DataError
from vlm_lora.inference.sinks import NotWritten, Rows, Sidecars, replace_text

METADATA = "metadata.jsonl"
MOST_CHARACTERS = 20_000
"""Of a caption that is shown."""

Change = Callable[[str | None], str | None]


class Album:
    """What is *held* of a picture is its caption file, or its line of metadata.jsonl, to the byte; None: nothing.

    Every file is read anew when it is asked for, so others may write there too.

    Raises:
        ConfigError: two pictures would share a caption file, or metadata.jsonl cannot be ours.
    """

    def __init__(self, folder: Path, rows: bool):
        self.folder, self.rows, self.lock = folder, rows, threading.Lock()
        self.pictures: dict[str, ImageRef] = {}
        for parent, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            for path in (Path(parent, file) for file in sorted(files) if not file.startswith((".", "__"))):
                name = path.relative_to(folder).as_posix()
                is_text = name.encode("utf-8", "ignore").decode() == name  # else no page can show it
                if path.suffix.lower() in PICTURES and is_text and path.resolve().is_relative_to(folder):
                    self.pictures[name] = ImageRef(path=path, name=name)
        self.sink(self.pictures, None)
        self.files = {} if rows else Sidecars([image.path for image in self.pictures.values()]).files

    def sink(self, names: Iterable[str], made_with: Mapping[str, object] | None) -> Rows | Sidecars:
        """Where the command would write these pictures' captions; None: only to look whether it could."""
        paths = [self.pictures[name].path for name in names]
        if not self.rows:
            return Sidecars(paths)
        how = {"made_with": dict(made_with or {}), "overwrite": made_with is None}
        return Rows(paths, "metadata", self._file(""), **how)

    def captions(self, names: Iterable[str]) -> dict[str, str | None]:
        """By name; "" where there is none, None where it is no plain text of a reasonable length."""
        lines = dict(reversed(self._lines())) if self.rows else {}
        return {name: self._said(lines.get(name) if self.rows else self._content(name)) for name in names}

    def save(self, name: str, text: str) -> tuple[str | None, str | None]:
        """Put this caption in place of the picture's; without a word, the caption goes. What was held, and is now."""
        text = text.strip().replace("\0", "").encode("utf-8", "replace").decode()

        def line(held: str | None) -> str:
            row = json.loads(held or "{}")
            return json.dumps({"file_name": name} | row | {_key(row): text}, ensure_ascii=False)

        return self.change(name, lambda held: None if not text else line(held) if self.rows else text + "\n")

    def change(self, name: str, to: Change) -> tuple[str | None, str | None]:
        """Replace what is held of a picture. Raises DataError where that cannot be."""
        with self.lock:
            file = self._file(name)
            try:
                if not self.rows:
                    before = _read(file)
                    after = to(before)
                    if after is None:
                        file.unlink(missing_ok=True)
                    elif after != before:
                        replace_text(file, after)
                    return before, after
                lines = self._lines()
                at = next((i for i, (of, _) in enumerate(lines) if of == name), None)
                before = None if at is None else lines[at][1]
                after = to(before)
                new = [] if after is None else [(name, after)]
                lines[len(lines) if at is None else at : len(lines) if at is None else at + 1] = new
                if before != after:
                    replace_text(file, "".join(text + "\n" for _, text in lines))
                return before, after
            except OSError as error:
                raise DataError(f"{file.name} cannot be written ({error.strerror})") from None

    def write(self, captions: Mapping[str, Caption], made_with: Mapping[str, object]) -> list[str]:
        """Write new captions of pictures that have none. What was wrong with others, in sentences."""
        wrong = [f"{name}: {caption.error}" for name, caption in captions.items() if caption.error]
        with self.lock, closing(self.sink(captions, made_with)) as sink:
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

    def _content(self, name: str) -> str | None:
        try:
            return _read(self._file(name))
        except (DataError, OSError):
            return "\ud800"  # no text

    def _lines(self) -> list[tuple[str | None, str]]:
        """Those of metadata.jsonl, and whose they are."""
        lines = [line for line in (_read(self._file("")) or "").split("\n") if line.strip()]
        return [(_row(line).get("file_name"), line) for line in lines]

    def _said(self, held: str | None) -> str | None:
        text = held or ""
        if self.rows and held:
            row = _row(held)
            text = row.get(_key(row), "\ud800")
        ok = isinstance(text, str) and len(text) <= MOST_CHARACTERS and text.encode("utf-8", "ignore").decode() == text
        return text.removeprefix("\ufeff").strip() if ok else None


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
