"""Where captions go: a line for each image in a file or on stdout, or a caption file beside each image.

A file is replaced in one step, so a crash leaves the old one or the new one. What an interrupted run wrote is read
again, so no image is captioned twice.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vlm_lora.config import flag_of
from vlm_lora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlm_lora.inference.caption import Decoding

CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
NAME_KEY = {"jsonl": "image", "metadata": "file_name"}
"""What a row calls its image, by format."""
DECODING = ("max_new_tokens", "num_beams", "temperature", "top_p", "seed")
"""The fields of `Decoding` that a file of captions has been made with in every version, which have a flag each."""
STEERING = ("top_k", "min_p", "repetition_penalty", "no_repeat_ngram", "begin_with", "avoid", "require", "attempts")
STEERING += ("words", "whole_sentences", "cut_loops")
"""Those that came later: named beside the captions where they are not at their default."""


def made_with(decoding: "Decoding", adapters: Sequence[str], **given: object) -> dict[str, object]:
    """What captions depend on, by the command's flags, for `Rows`. ``given``: those beside decoding and adapters."""
    told: dict[str, object] = {"--model": None, "--prompt": None, "--endpoint": None, "--prefix": "", "--suffix": ""}
    told |= {flag_of(name): value for name, value in given.items()}
    told |= {"--adapter": [os.path.realpath(a) if os.path.isdir(a) else a for a in adapters]}
    told |= {flag_of(name): getattr(decoding, name) for name in DECODING}
    steered, default = {name: getattr(decoding, name) for name in STEERING}, type(decoding)()
    return told | {
        flag_of(name): list(value) if isinstance(value, tuple) else value  # as JSON gives it back
        for name, value in steered.items()
        if value != getattr(default, name)
    }


class Stdout:
    """A line for each image, on stdout: ``text`` or ``jsonl`` as in `Rows`.

    ``alone``: there is only one image, and ``text`` leaves out its name.
    """

    def __init__(self, format: str, *, adapters: Sequence[str] = (), alone: bool = False):
        self.format, self.adapters, self.alone = format, adapters, alone
        self.holds_errors = format == "jsonl"
        self.stream = sys.stdout

    def has(self, path: Path) -> bool:
        return False

    def write(self, path: Path, texts: Sequence[str] | None, error: str | None = None) -> None:
        """As `Rows.write`. A reader of stdout that has gone is a BrokenPipeError."""
        if texts is None and not self.holds_errors:
            return
        if texts and len(texts) == 1 and self.alone and self.format == "text":
            line = "\n".join(map(_spaced, texts[0].split("\n")))
        else:
            name = one_line(path) if self.format == "text" else str(path)
            line = _line(self.format, name, texts, error, self.adapters, self.stream.encoding)
        try:
            print(printable(line), file=self.stream, flush=True)
        except BrokenPipeError:
            raise
        except OSError as failure:
            raise _cannot_be_written("stdout", self.stream, failure) from failure

    def close(self) -> None:
        pass


class Rows:
    """A line for each image, in a file that an interrupted run resumes.

    A line that is in the file stays until a better one takes its place: a new caption of its image.

    Args:
        paths: the images that are to have a caption.
        format: ``text`` (path, tab, captions), ``jsonl`` or ``metadata``.
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
        file: Path,
        *,
        made_with: dict[str, object],
        adapters: Sequence[str] = (),
        overwrite: bool = False,
        inputs: Sequence[Path] = (),
    ):
        self.format, self.file, self.made_with, self.adapters = format, file, made_with, adapters
        self.holds_errors = format == "jsonl"
        self.stream: IO[str] | None = None
        self.overwrite = overwrite
        self.lines: list[str | None] = []  # of the file, blank ones too; None: another took its place
        self.places: dict[str, list[int]] = {}  # in `lines`, by image name; a person may have written several for one
        self.done: set[str] = set()  # names of the images that need no caption any more
        self._replaced = False  # whether `lines` holds what the file does not
        self._next_rewrite = 0.0
        if format == "metadata":
            self._require_metadata_place(paths)
        _require_output(file, (*paths, *inputs))
        self.beside = file.with_name(f".{file.name}.made-with")
        self._read({self._name(path) for path in paths})
        if overwrite:
            self.done = set()
        elif self.done:
            self._refuse_to_mix()

    def has(self, path: Path) -> bool:
        return self._name(path) in self.done

    def write(self, path: Path, texts: Sequence[str] | None, error: str | None = None) -> None:
        """The captions of an image, or without any its error.

        Raises:
            NotWritten: a training set cannot name this image.
            DataError: the disk is full or the like.
        """
        if texts is None and not self.holds_errors:
            return
        name = self._name(path)
        line = _line(self.format, name, texts, error, self.adapters, "utf-8")
        known = name in self.places
        for place in self.places.setdefault(name, [len(self.lines)])[1:]:
            self.lines[place] = None
        place = self.places[name][0]
        self.lines[place : place + 1] = [line]
        try:
            # Opened for the first caption: where there never is one, an earlier file stays.
            if self.stream is None or (known and time.monotonic() >= self._next_rewrite):
                self._rewrite()
            elif known:
                self._replaced = True
            else:
                print(line, file=self.stream, flush=True)
        except OSError as failure:
            raise _cannot_be_written(self.file, self.stream, failure) from failure

    def close(self) -> None:
        if self.stream:
            if self._replaced:
                self._rewrite()
            self.stream.close()

    # -- inside --------------------------------------------------------------------------------------------------

    def _name(self, path: Path) -> str:
        """An image's name in the file."""
        if self.format == "metadata":
            return Path(os.path.abspath(path)).relative_to(Path(os.path.abspath(self.file)).parent).as_posix()
        return str(path) if self.format == "jsonl" else one_line(path)

    def _require_metadata_place(self, paths: Sequence[Path]) -> None:
        from vlm_lora.data.readers.detect import METADATA  # here, as it brings PIL

        above = Path(os.path.abspath(self.file)).parent
        if outside := [p for p in paths if not Path(os.path.abspath(p)).is_relative_to(above)]:
            raise ConfigError(f"{one_line(outside[0])} is not below {above}, where {self.file.name} goes.")
        others = [name for name in METADATA if name != self.file.name and (above / name).exists()]
        if self.file.name in METADATA and others:
            raise ConfigError(
                f"{self.file}: {others[0]} lies beside it, and a folder with both cannot be read as data. Move that "
                "one, or give another --output."
            )

    def _read(self, names: set[str]) -> None:
        """Fill ``lines`` and ``done`` from the file. Images of ``names`` that have an error there are tried again."""
        if not self.file.exists():
            return
        try:
            *ended, cut_off = self.file.read_bytes().decode("utf-8", "surrogateescape").split("\n")
        except OSError as error:
            raise ConfigError(f"--output {self.file}: cannot be read ({error.strerror}).") from error
        for number, line in enumerate([*ended, cut_off], start=1):
            last = number > len(ended)  # and so cut off by a kill, or by an editor that ends no last line
            if not line.strip():
                self.lines += [line] if line or not last else []
                continue
            try:
                name, done = self._name_in(line, names)
            except (ValueError, TypeError, KeyError):
                if last and self.places:
                    continue
                raise ConfigError(
                    f"{self.file}:{number}: is not a line that `caption --format {self.format}` wrote, so this file "
                    "stays as it is. Give another --output."
                ) from None
            self.places.setdefault(name, []).append(len(self.lines))
            self.lines.append(line)
            if done and not (
                last and self.format == "text" and name in names
            ):  # whose caption may go on: nothing tells
                self.done.add(name)

    def _name_in(self, line: str, names: set[str]) -> tuple[str, bool]:
        """The image that a line names and whether it has its caption.

        Raises ValueError, TypeError or KeyError for a line that is not of this format.
        """
        from vlm_lora.data.readers.folders import is_image_name  # here, as it brings PIL

        if self.format == "text":
            name, tab, _ = line.partition("\t")
            # Any table with tabs looks like ours: then the names in it, or the file beside it, have to tell.
            if not tab or not (name in names or is_image_name(Path(name)) or self.beside.is_file()):
                raise ValueError("a line of something else")
            return name, True
        row, key = json.loads(line), NAME_KEY[self.format]
        if not isinstance(row[key], str):
            raise TypeError("no name")
        failed = self.holds_errors and row.keys() == {key, "error"}  # as `write` has it
        return row[key], not failed

    def _refuse_to_mix(self) -> None:
        try:
            before = json.loads(self.beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # an older file, or one that has moved
            return
        for key in dict.fromkeys((*self.made_with, *before)):
            earlier, now = before.get(key), self.made_with.get(key)
            if earlier != now:
                raise ConfigError(
                    f"{self.file}: its captions were made with {key} {earlier!r}, now it is {now!r}. Give another "
                    "--output, or --overwrite to caption again."
                )

    def _rewrite(self) -> None:
        """Write all lines anew. In a long file this takes long, so it is done only now and then: a kill loses a few
        seconds of captions, and no line that was there before."""
        started, first = time.monotonic(), self.stream is None
        if self.stream:
            self.stream.close()
        elif self.overwrite and self.format == "metadata":  # a person may have corrected it
            keep_old(self.file)
        replace_text(self.file, "".join(f"{line}\n" for line in self.lines if line is not None))
        if first:
            replace_text(self.beside, json.dumps(self.made_with) + "\n")
        self.stream = self.file.open("a", encoding="utf-8", errors="surrogateescape", newline="\n")
        self._replaced = False
        if not first:
            self._next_rewrite = time.monotonic() + max(1.0, 20 * (time.monotonic() - started))


class Sidecars:
    """A caption file beside each image: the one that is there already, as the readers find it, or a new .txt.

    Where ``overwrite`` replaces one, the old one is kept beside it (`keep_old`).

    Raises:
        ConfigError: two images would share one caption file, or it is itself one of the images or other ``inputs``.
    """

    holds_errors = False

    def __init__(
        self, paths: Sequence[Path], *, overwrite: bool = False, append: bool = False, inputs: Sequence[Path] = ()
    ):
        self.overwrite, self.append = overwrite, append
        self.files = _caption_files(paths)
        read = {os.path.realpath(path) for path in (*paths, *inputs)}
        of: dict[Path, Path] = {}
        for path, file in self.files.items():
            if os.path.realpath(file) in read:
                raise ConfigError(f"{one_line(file)} would hold a caption, and is one of the inputs; rename it.")
            other = of.setdefault(file, path)
            if other != path:
                raise ConfigError(f"{one_line(f'{other} and {path}')} would share one caption file, {file.name}.")

    def has(self, path: Path) -> bool:
        return not (self.overwrite or self.append) and os.path.isfile(self.files[path])

    def write(self, path: Path, texts: Sequence[str] | None, error: str | None = None) -> None:
        """Raises NotWritten where this image's file cannot be written."""
        if texts is None:
            return
        file, text = self.files[path], texts[0] + "\n"
        try:
            before = file.read_bytes().decode() if self.append and file.exists() else ""
            end = "\r\n" if "\r\n" in before else "\n"
            text = text.replace("\n", end)
            before += end if before and not before.endswith("\n") else ""
            if f"\n{text}" not in f"\n{before}":  # else written the last time, before the run was stopped
                if self.overwrite:
                    keep_old(file)
                replace_text(file, before + text)
        except UnicodeDecodeError as failure:
            byte = f"byte 0x{failure.object[failure.start]:02x} at position {failure.start}"
            raise NotWritten(f"{one_line(file.name)} is not UTF-8 ({byte}); save it as UTF-8 to add to it") from None
        except OSError as failure:
            raise NotWritten(f"{one_line(file.name)} cannot be written: {failure.strerror}") from failure

    def close(self) -> None:
        pass


def _caption_files(paths: Sequence[Path]) -> dict[Path, Path]:
    """The caption file of each image, whether it is there yet or not."""
    from vlm_lora.data.readers.folders import CAPTION_SUFFIXES  # here, as it brings PIL

    there: dict[Path, Path] = {}  # by the path without its suffix, `a` or `a.jpg`; .caption before .txt
    for folder in {path.parent for path in paths}:
        with suppress(OSError):  # it cannot be listed; whether it can be written to, `write` finds out
            files = [folder / name for name in os.listdir(folder)]
            files = [file for file in files if file.suffix.lower() in CAPTION_SUFFIXES]
            files.sort(key=lambda file: (file.suffix.lower() == ".caption", file))
            there |= {file.with_suffix(""): file for file in files}
    return {path: there.get(path.with_suffix("")) or there.get(path) or path.with_suffix(".txt") for path in paths}


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
    """One image's caption cannot be written; the others' may be."""


def keep_old(file: Path) -> None:
    """Keep what a file holds beside it, under the first name of ``cat.txt.old``, ``cat.txt.old2`` and so on that is
    free."""
    if not file.is_file():
        return
    number = 1
    while os.path.lexists(kept := file.with_name(f"{file.name}.old{number if number > 1 else ''}")):
        number += 1
    shutil.copy2(file, kept)


def replace_text(file: Path, text: str) -> None:
    """Write all of a file or nothing; a link stays, and the file it leads to is replaced.

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


def printable(text: str, encoding: str = "") -> str:
    """The text as stdout can show it: � or ? for what its encoding (by default) has not."""
    text, encoding = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), encoding or sys.stdout.encoding
    return text.encode(encoding, "replace").decode(encoding)


def _line(
    format: str, name: str, texts: Sequence[str] | None, error: str | None, adapters: Sequence[str], encoding: str
) -> str:
    """The captions, or the error, of the image of that name, in a format of `Rows`."""
    if format == "text":
        return "\t".join([name, *map(_spaced, texts or ())])
    row: dict[str, object] = {NAME_KEY[format]: name}
    if texts is None:
        row["error"] = error
    elif format == "metadata":
        if printable(name, "utf-8") != name:
            raise NotWritten("its name is not UTF-8, so that no training set can name it; rename it")
        row["text"] = texts[0]
    elif len(texts) == 1:
        row["caption"] = texts[0]
    else:
        row["captions"] = dict(zip(adapters, texts, strict=True))
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:  # a name of bytes that are no text, or a small encoding: JSON has a way to write it
        return json.dumps(row)
    return line


def _spaced(caption: str) -> str:
    return re.sub(CONTROL, " ", caption)


def _cannot_be_written(where: Path | str, stream: IO[str] | None, failure: OSError) -> DataError:
    """The error to raise. What is left in the stream is dropped: closing it would try again, and fail again."""
    if stream and not stream.closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return DataError(f"{where}: cannot be written ({failure.strerror}).")
