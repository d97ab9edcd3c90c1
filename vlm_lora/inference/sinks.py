"""Where captions go: a line an image in a file or on stdout, or a caption file beside each image.

Files are written anew and put in place at once: what was there is whole or untouched. What was written by an earlier,
interrupted run is found again, so that no image is captioned twice.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from vlm_lora.errors import ConfigError, DataError

CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
NAME_KEY = {"jsonl": "image", "metadata": "file_name"}
"""What a row calls its image, by format."""


class Rows:
    """A line an image, in a file that an interrupted run goes on with, or on stdout.

    Args:
        paths: the images that are to have a caption.
        format: ``text`` (path, tab, captions), ``jsonl`` or ``metadata``.
        file: None for stdout.
        made_with: what the captions depend on, kept beside the file: captions made with something else are not mixed
            into it.
        adapters: names of the captions of an image, if there are several.
        overwrite: the rows of ``paths`` are written anew. Those of other images stay.

    Raises:
        ConfigError: the file cannot be written, is not of this format, or was made with something else.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        format: str,
        file: Path | None,
        *,
        made_with: dict[str, object],
        adapters: Sequence[str] = (),
        overwrite: bool = False,
    ):
        self.format, self.file, self.made_with, self.adapters = format, file, made_with, adapters
        self.holds_errors = format == "jsonl"
        self.stream: IO[str] | None = None
        self.kept: list[tuple[str, str]] = []
        if file and format == "metadata":
            above = Path(os.path.abspath(file)).parent
            if outside := [p for p in paths if not Path(os.path.abspath(p)).is_relative_to(above)]:
                raise ConfigError(f"{one_line(outside[0])} is not below {above}, where {file.name} goes.")
        if file:
            if not file.absolute().parent.is_dir():
                raise ConfigError(f"--output {file}: there is no folder {file.parent}; make it first.")
            if os.path.lexists(file) and not Path(os.path.realpath(file)).parent.is_dir():
                raise ConfigError(f"--output {file}: links to {os.path.realpath(file)}, whose folder is not there.")
            if file.exists() and not file.is_file():
                raise ConfigError(
                    f"--output {file}: is not a regular file; name one, or leave --output out to write to stdout."
                )
            names = {self._name(path) for path in paths}
            try:
                self.kept = self._lines(names)
            except ConfigError:  # not ours: who says --overwrite replaces it
                if not overwrite:
                    raise
            if overwrite:
                self.kept = [row for row in self.kept if row[0] not in names]
            elif self.kept:
                self._refuse_to_mix()
        self.done = {name for name, _ in self.kept}

    def has(self, path: Path) -> bool:
        return self.file is not None and self._name(path) in self.done

    def write(self, path: Path, texts: Sequence[str] | None, error: str | None = None, *, alone: bool = False) -> None:
        """The captions of an image, or without any its error. ``alone`` on stdout leaves out the image's name.

        Raises:
            NotWritten: a training set cannot name this image.
            DataError: the disk is full or the like. A reader of stdout that has gone is a BrokenPipeError.
        """
        if texts is None and not self.holds_errors:
            return
        if self.format == "text":
            told = [_spaced(text) for text in texts]
            if alone and not self.file:
                line = "\n".join(map(_spaced, texts[0].split("\n")))
            else:
                line = "\t".join([self._name(path), *told])
        else:
            row = {NAME_KEY[self.format]: self._name(path)}
            if texts is None:
                row["error"] = error
            elif self.format == "metadata":
                if printable(self._name(path), "utf-8") != self._name(path):
                    raise NotWritten("its name is not UTF-8, so that no training set can name it; rename it")
                row["text"] = texts[0]
            elif len(texts) == 1:
                row["caption"] = texts[0]
            else:
                row["captions"] = dict(zip(self.adapters, texts, strict=True))
            line = _json(row, "utf-8" if self.file else sys.stdout.encoding)
        try:
            # Opened for the first caption: where there never is one, an earlier file stays.
            self.stream = self.stream or self._open()
            print(line if self.file else printable(line), file=self.stream, flush=True)
        except BrokenPipeError:
            raise
        except OSError as failure:
            self._drop_what_is_left()
            raise DataError(f"{self.file or 'stdout'}: cannot be written ({failure.strerror}).") from failure

    def close(self) -> None:
        if self.file and self.stream:
            self.stream.close()

    # -- inside --------------------------------------------------------------------------------------------------

    def _name(self, path: Path) -> str:
        """An image's name in the file."""
        if self.format == "metadata":
            return Path(os.path.abspath(path)).relative_to(Path(os.path.abspath(self.file)).parent).as_posix()
        return str(path) if self.format == "jsonl" else one_line(path)

    def _lines(self, names: set[str]) -> list[tuple[str, str]]:
        """(image, line) of the captions in the file. A line cut off goes, and so do errors: they are tried again."""
        if not self.file.exists():
            return []
        kept = []
        try:
            *whole, cut = self.file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        except OSError as error:
            raise ConfigError(f"--output {self.file}: cannot be read ({error.strerror}).") from error
        for number, line in enumerate([*whole, cut], start=1):
            if not line.strip():
                continue
            last = number > len(whole)
            try:
                if self.format == "text":
                    name, tab, _ = line.partition("\t")
                    if last and (name in names if tab else any(other.startswith(line) for other in names)):
                        continue  # whole or not: nothing tells
                    if not tab:
                        raise ValueError("no tab")
                    kept.append((name, line))
                else:
                    key = NAME_KEY[self.format]
                    start = json.dumps({key: ""})[:-2]  # {"image": "
                    if last and (line.startswith(start) or start.startswith(line)) and not _is_json(line):
                        continue
                    row = json.loads(line)
                    name = row[key]
                    if not isinstance(name, str):
                        raise TypeError("no name")
                    if "error" not in row:
                        kept.append((name, line))
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"{self.file}:{number}: is not a line that `caption --format {self.format}` wrote, so nothing is "
                    "added to this file. Give another --output, or --overwrite to replace it."
                ) from None
        return kept

    @property
    def _beside(self) -> Path:
        return self.file.with_name(f".{self.file.name}.made-with")

    def _refuse_to_mix(self) -> None:
        try:
            before = json.loads(self._beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # an older file, or one that has moved
            return
        for key, value in self.made_with.items():
            if before.get(key) != value:
                raise ConfigError(
                    f"{self.file}: its captions were made with {key} {before.get(key)!r}, now it is {value!r}. Give "
                    "another --output, or --overwrite to caption anew."
                )

    def _open(self) -> IO[str]:
        if not self.file:
            return sys.stdout
        replace_text(self.file, "".join(line + "\n" for _, line in self.kept))
        replace_text(self._beside, json.dumps(self.made_with) + "\n")
        return self.file.open("a", encoding="utf-8", errors="surrogateescape", newline="\n")

    def _drop_what_is_left(self) -> None:
        """What could not be written would be tried again when the stream is closed, and fail there a second time."""
        if self.stream:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Sidecars:
    """A caption file beside each image: .txt, or the .caption that is there already.

    Raises:
        ConfigError: two images would share one caption file, or it is itself one of the images.
    """

    holds_errors = False

    def __init__(self, paths: Sequence[Path], *, overwrite: bool = False, append: bool = False):
        self.overwrite, self.append = overwrite, append
        images = {os.path.realpath(path) for path in paths}
        of: dict[Path, Path] = {}
        for path in paths:
            file = self._file(path)
            if os.path.realpath(file) in images:
                raise ConfigError(f"{one_line(file)} would hold a caption, and is an image to caption; rename it.")
            other = of.setdefault(file, path)
            if other != path:
                raise ConfigError(f"{one_line(f'{other} and {path}')} would share one caption file, {file.name}.")

    def has(self, path: Path) -> bool:
        return not (self.overwrite or self.append) and os.path.isfile(self._file(path))

    def write(self, path: Path, texts: Sequence[str] | None, error: str | None = None, *, alone: bool = False) -> None:
        """Raises NotWritten where this image's file cannot be written."""
        if texts is None:
            return
        file, text = self._file(path), texts[0] + "\n"
        try:
            before = file.read_text(encoding="utf-8") if self.append and file.exists() else ""
            before += "\n" if before and not before.endswith("\n") else ""
            if f"\n{text}" not in f"\n{before}":  # else said the last time, before the run was stopped
                replace_text(file, before + text)
        except UnicodeDecodeError as failure:
            byte = f"byte 0x{failure.object[failure.start]:02x} at position {failure.start}"
            raise NotWritten(f"{one_line(file.name)} is not UTF-8 ({byte}); save it as UTF-8 to add to it") from None
        except OSError as failure:
            raise NotWritten(f"{one_line(file.name)} cannot be written: {failure.strerror}") from failure

    def close(self) -> None:
        pass

    def _file(self, path: Path) -> Path:
        other = path.with_suffix(".caption")
        return other if os.path.exists(other) else path.with_suffix(".txt")


class NotWritten(DataError):
    """One image's caption cannot be written; the others' may well be."""


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all, through a link to what it links to.

    Raises:
        OSError: it cannot be written, or is no regular file. Nothing is left beside it.
    """
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        raise OSError(0, "it is a folder or a device; expected a file")
    temporary = target.with_name(f".vlm-lora.{os.getpid()}")  # short: the file's own name may be as long as can be
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def one_line(name: Path | str) -> str:
    """A file's name on one line, no other's: backslashes, line breaks and what steers a terminal as in Python."""
    escaped = re.compile(rf"\\|{CONTROL}")
    return escaped.sub(lambda char: char[0].encode("unicode_escape").decode(), str(name))


def printable(text: str, encoding: str | None = None) -> str:
    """The text as stdout can show it: � or ? for what its encoding (by default) has not."""
    encoding = encoding or sys.stdout.encoding
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return whole.encode(encoding, "replace").decode(encoding)


def _spaced(caption: str) -> str:
    return re.sub(CONTROL, " ", caption)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _json(row: dict, encoding: str) -> str:
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:  # a name of bytes that are no text, or a small encoding: JSON has a way to write it
        return json.dumps(row)
    return line
