"""The folders that the page reads and writes: which there are, what is uploaded, and pictures with their captions, as
the command `caption` writes them: in a file beside each picture, or in metadata.jsonl."""

import json
import os
import re
import secrets
import shutil
import stat
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import IO, Any

from vlm_lora import Caption, ImageRef
from vlm_lora.data.readers.folders import images_below, is_image_name
from vlm_lora.errors import DataError
from vlm_lora.inference.sinks import NotWritten, Rows, Sidecars, replace_text

METADATA = "metadata.jsonl"
MOST_CHARACTERS = 20_000
"""Of a caption that is shown."""
TEXTS = (".csv", ".json", ".jsonl", ".tsv", ".txt")
MOST_FILES = 2_000
MOST_BYTES = 1 << 30
"""Of all that one upload unpacks to."""
MOST_FOLDERS = 500
"""That are offered; others are found by their names."""
DEPTH = 3
UPLOADS = "uploads"
KEPT_SECONDS = 3600
"""So long uploads are kept where they are no data to train on; and never beyond the demo."""


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
        for path in images_below(self.folder):
            name = path.relative_to(self.folder).as_posix()
            is_text = name.encode("utf-8", "ignore").decode() == name  # else no page can show it
            if is_text and path.resolve().is_relative_to(self.folder):
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
        images = [self.pictures[name] for name in captions if name in self.pictures]
        with self.lock, closing(self.sink(images, made_with)) as sink:
            there = self.captions(image.name for image in images)  # a person may have written one since
            for name, caption in captions.items():
                if caption.text is not None and there.get(name, "") == "":
                    try:
                        self._file(name)
                        sink.write(self.pictures[name].path, [caption.text])
                    except (NotWritten, DataError) as error:
                        wrong.append(f"{name}: {error}")
        return wrong

    # -- inside --------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        if name and name not in self.pictures:
            raise DataError("the picture is no longer in the folder")
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


class Roots:
    """The folders below which the page may read and write, under their names: no path of the machine is shown.

    Args:
        uploads: where uploads go.
        passing: uploads are somebody else's: they are offered to nobody, and deleted when their time is over.
    """

    def __init__(self, folders: Sequence[Path], uploads: Path, *, passing: bool = False):
        self.uploads, self.passing = uploads.resolve(), passing
        self.folders = {folder.name: folder for folder in map(Path.resolve, folders)}
        self._album = cache(Album)

    def names(self) -> list[str]:
        """The folders that hold files of ours, to be chosen from; hidden ones and links are passed over."""
        found = []
        for name, root in (self.folders | ({} if self.passing else {UPLOADS: self.uploads})).items():
            for parent, folders, files in os.walk(root):
                parts = Path(parent).relative_to(root).parts
                folders[:] = sorted(each for each in folders if not each.startswith(".") and len(parts) < DEPTH)
                if any(map(_is_ours, files)):
                    found.append("/".join((name, *parts)))
                if len(found) == MOST_FOLDERS:
                    return found
        return found

    def folder(self, name: str | None) -> Path:
        """Raises DataError for what is no folder below a root; a link that leads out of it is none."""
        first, *rest = str(name or "").split("/")
        root = self.uploads if first == UPLOADS and rest else self.folders.get(first)
        path = root.joinpath(*rest).resolve() if root and "\0" not in str(name) else None
        if root is None or path is None or not path.is_relative_to(root) or not path.is_dir():
            raise DataError(f"{name!r} is no folder that the demo may read; --roots says which it may")
        return path

    def album(self, name: str | None, rows: bool, *, anew: bool = False) -> Album:
        """Of a folder and a form one, as those who write take turns; ``anew``: with the pictures that are there now."""
        album = self._album(self.folder(name), bool(rows))
        if anew:
            album.look()
        return album

    def take_in(self, files: Sequence[ImageRef]) -> str:
        """The name of the new folder into which uploaded pictures, texts and what is in zips are put, to stay there.

        Raises:
            DataError: a name that leads elsewhere, a link, another kind of file, two of one name, or too much of all;
                the folder is then not there.
        """
        old = (folder for folder in self.uploads.glob("*") if folder.stat().st_mtime < time.time() - KEPT_SECONDS)
        for folder in old if self.passing else ():
            shutil.rmtree(folder, ignore_errors=True)
        name = f"{stem_of(files[0].name)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        folder, room, count = self.uploads / name, MOST_BYTES, 0
        folder.mkdir(parents=True)
        for file in files:
            try:
                for inside, source in _sent(file):
                    with source, _new(folder, inside) as written:
                        piece, count = b" ", count + 1
                        while piece:
                            piece = source.read(1 << 20)  # what a zip says of its sizes is not believed
                            room -= len(piece)
                            if room < 0 or count > MOST_FILES:
                                most = f"{MOST_FILES:,} files and {MOST_BYTES >> 20:,} MB unpacked are the most"
                                raise DataError(f"This is too much at once: {most}. Put it below --roots instead")
                            written.write(piece)
            except BaseException as error:
                shutil.rmtree(folder, ignore_errors=True)
                if isinstance(error, zipfile.BadZipFile | zlib.error | RuntimeError | EOFError | OSError):
                    what = f"cannot be unpacked ({type(error).__name__}); zip the folder again"
                    raise DataError(f"{file.name}: {what}") from error
                raise
        return f"{UPLOADS}/{name}"


def _sent(file: ImageRef) -> Iterator[tuple[str, IO[bytes]]]:
    """An uploaded file, or those in a zip, by name."""
    if ".zip" not in (file.path.suffix.lower(), file.name.lower()[-4:]):
        yield file.name, file.path.open("rb")
        return
    with zipfile.ZipFile(file.path) as packed:
        for member in packed.infolist():
            if member.is_dir() or "__MACOSX" in member.filename:
                continue
            if member.flag_bits & 1 or stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                raise DataError(f"{file.name}: {member.filename!r} is a link, or has a password; zip plain files")
            yield member.filename, packed.open(member)


def _new(folder: Path, name: str) -> IO[bytes]:
    """The file of this name, which is not there yet; its folder is made."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") or ":" in part for part in parts):
        raise DataError(f"{name!r} leads out of the folder it is to be in; give it a plain name")
    if not _is_ours(name):
        raise DataError(f"{name!r} is neither a picture nor a text ({', '.join(TEXTS)}); leave it out")
    target = folder.joinpath(*parts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb")
    except FileExistsError:
        raise DataError(f"{name!r} is there twice; rename one of the two, or zip their folders") from None
    except OSError as error:
        raise DataError(f"{name!r}: cannot be put there ({error.strerror}); give it a shorter name") from error


def _is_ours(name: str) -> bool:
    return is_image_name(Path(name)) or name.lower().endswith(TEXTS)


def stem_of(name: str) -> str:
    """A plain name for a folder, from any."""
    return re.sub(r"[^\w-]+", "-", name.rpartition("/")[2].split(".")[0]).strip("-")[:60] or "pictures"


def short(text: str, *folders: Path) -> str:
    """Without the paths of this machine."""
    for path in (above for folder in folders for above in (folder, *folder.parents[:-1])):
        text = text.replace(f"{path}/", "").replace(str(path), path.name)
    return text
