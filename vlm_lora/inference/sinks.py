"""Where captions go: a line an image in a file or on stdout, or a caption file beside each image.

Files are written anew and put in place at once: what was there is whole or untouched. What was written by an earlier,
interrupted run is found again, so that no image is captioned twice.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from vlm_lora.errors import ConfigError, DataError

CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
NAME_KEY = {"jsonl": "image", "metadata": "file_name"}
"""What a row calls its image, by format."""


class Rows:
    """A line an image, in a file that an interrupted run resumes, or on stdout.

    A line that is in the file stays until a better one takes its place: a new caption of its image.

    Args:
        paths: the images that are to have a caption.
        format: ``text`` (path, tab, captions), ``jsonl`` or ``metadata``.
        file: None for stdout.
        made_with: what the captions depend on, kept beside the file: captions made with something else are not mixed
            into it.
        adapters: names of the captions of an image, if there are several.
        overwrite: images that have a caption in the file get a new one, in its place.
        inputs: other files that are read, and so are not written to.

    Raises:
        ConfigError: the file cannot be written, is an input, is not of this format, or was made with something else.
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
        inputs: Sequence[Path] = (),
    ):
        self.format, self.file, self.made_with, self.adapters = format, file, made_with, adapters
        self.holds_errors = format == "jsonl"
        self.stream: IO[str] | None = None
        self.lines: dict[str, list[str]] = {}  # by the image's name; of one image a person may have written several
        self.done: set[str] = set()  # names of the images that need no caption any more
        self._replaced = False  # whether `lines` holds what the file does not
        self._next_rewrite = 0.0
        if file is None:
            return
        if format == "metadata":
            above = Path(os.path.abspath(file)).parent
            if outside := [p for p in paths if not Path(os.path.abspath(p)).is_relative_to(above)]:
                raise ConfigError(f"{one_line(outside[0])} is not below {above}, where {file.name} goes.")
        _require_output(file, (*paths, *inputs))
        self._read({self._name(path) for path in paths})
        if overwrite:
            self.done = set()
        elif self.done:
            self._refuse_to_mix()

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
            if not self.file:
                print(printable(line), file=self.stream, flush=True)
            elif (name := self._name(path)) in self.lines:
                self.lines[name] = [line]
                self._replaced = True
                if time.monotonic() >= self._next_rewrite:
                    self._rewrite()
            else:
                self.lines[name] = [line]
                print(line, file=self.stream, flush=True)
        except BrokenPipeError:
            raise
        except OSError as failure:
            self._drop_what_is_left()
            raise DataError(f"{self.file or 'stdout'}: cannot be written ({failure.strerror}).") from failure

    def close(self) -> None:
        if self.file and self.stream:
            if self._replaced:
                self._rewrite()
            self.stream.close()

    # -- inside --------------------------------------------------------------------------------------------------

    def _name(self, path: Path) -> str:
        """An image's name in the file."""
        if self.format == "metadata":
            return Path(os.path.abspath(path)).relative_to(Path(os.path.abspath(self.file)).parent).as_posix()
        return str(path) if self.format == "jsonl" else one_line(path)

    def _read(self, names: set[str]) -> None:
        """Fill ``lines`` and ``done`` from the file. Images of ``names`` that have an error there are tried again."""
        if not self.file.exists():
            return
        try:
            *ended, cut_off = self.file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        except OSError as error:
            raise ConfigError(f"--output {self.file}: cannot be read ({error.strerror}).") from error
        for number, line in enumerate([*ended, cut_off], start=1):
            if not line.strip():
                continue
            last = number > len(ended)
            try:
                name, done = self._name_in(line, names, last)
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"{self.file}:{number}: is not a line that `caption --format {self.format}` wrote, so this file "
                    "stays as it is. Give another --output."
                ) from None
            if name is not None:
                self.lines.setdefault(name, []).append(line)
                self.done |= {name} if done else set()

    def _name_in(self, line: str, names: set[str], last: bool) -> tuple[str | None, bool]:
        """The image that a line names and whether it has its caption; None for a line that a kill cut off.

        Raises ValueError, TypeError or KeyError for a line that is not of this format.
        """
        if self.format == "text":
            name, tab, _ = line.partition("\t")
            if last and not tab and any(other.startswith(line) for other in names):
                return None, False
            if not tab:
                raise ValueError("no tab")
            return name, not (last and name in names)  # the last line may be cut off: nothing tells
        key = NAME_KEY[self.format]
        start = json.dumps({key: ""})[:-2]  # {"image": "
        if last and (line.startswith(start) or start.startswith(line)) and not _is_json(line):
            return None, False
        row = json.loads(line)
        if not isinstance(row[key], str):
            raise TypeError("no name")
        failed = self.holds_errors and row.keys() == {key, "error"}  # as `write` has it
        return row[key], not failed

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
        replace_text(self.file, self._text())
        replace_text(self._beside, json.dumps(self.made_with) + "\n")
        return self.file.open("a", encoding="utf-8", errors="surrogateescape", newline="\n")

    def _text(self) -> str:
        return "".join(line + "\n" for lines in self.lines.values() for line in lines)

    def _rewrite(self) -> None:
        """Put the replaced lines into the file. It is written whole, so in a long one only every now and then: a kill
        loses a few seconds of captions, and no line that was there before."""
        started = time.monotonic()
        self.stream.close()
        replace_text(self.file, self._text())
        self.stream = self.file.open("a", encoding="utf-8", errors="surrogateescape", newline="\n")
        self._replaced = False
        self._next_rewrite = time.monotonic() + max(1.0, 20 * (time.monotonic() - started))

    def _drop_what_is_left(self) -> None:
        """What could not be written would be tried again when the stream is closed, and fail there a second time."""
        if self.stream:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Sidecars:
    """A caption file beside each image: .txt, or the .caption that is there already.

    Raises:
        ConfigError: two images would share one caption file, or it is itself one of the images or other ``inputs``.
    """

    holds_errors = False

    def __init__(
        self, paths: Sequence[Path], *, overwrite: bool = False, append: bool = False, inputs: Sequence[Path] = ()
    ):
        self.overwrite, self.append = overwrite, append
        read = {os.path.realpath(path) for path in (*paths, *inputs)}
        of: dict[Path, Path] = {}
        for path in paths:
            file = self._file(path)
            if os.path.realpath(file) in read:
                raise ConfigError(f"{one_line(file)} would hold a caption, and is one of the inputs; rename it.")
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


def _require_output(file: Path, inputs: Sequence[Path]) -> None:
    """Raises ConfigError for a file that cannot be written to, or that is itself read."""
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--output {file}: there is no folder {file.parent}; make it first.")
    if os.path.lexists(file) and not Path(os.path.realpath(file)).parent.is_dir():
        raise ConfigError(f"--output {file}: links to {os.path.realpath(file)}, whose folder is not there.")
    if file.exists() and not file.is_file():
        raise ConfigError(
            f"--output {file}: is not a regular file; name one, or leave --output out to write to stdout."
        )
    if file.exists() and any(path.exists() and os.path.samefile(file, path) for path in inputs):
        raise ConfigError(f"--output {file}: is one of the inputs, and would be overwritten; name another file.")


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
