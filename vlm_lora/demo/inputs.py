"""What comes in: pictures, through the loader that training uses and through no other, in folders below the roots that
the demo was started with, and uploaded; and numbers."""

import logging
import os
import re
import reprlib
import secrets
import shutil
import stat
import time
import zipfile
import zlib
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

import gradio as gr
from gradio.blocks import Block
from gradio.data_classes import FileData
from gradio.exceptions import ComponentProcessingError
from pydantic import ValidationError

from vlm_lora import ImageRef, load_image
from vlm_lora.demo.album import PICTURES, Album
from vlm_lora.errors import ConfigError, DataError

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 512
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


def plain(text: str) -> gr.Error:
    """An error as a person at the page sees it: a sentence, and nothing in the log."""
    text = text.removesuffix(".") + "."
    return gr.Error(text[0].upper() + text[1:], print_exception=False)


def plainly(error: BaseException) -> gr.Error:
    """What a person at the page is told of any error: what they can do something about, and else where it is told."""
    error = error.__cause__ or error if isinstance(error, ComponentProcessingError) else error  # what `preprocess` says
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, DataError | ConfigError):
        return plain(str(error))
    if isinstance(error, ValidationError):
        return plain("The picture is no file. From Python send it as handle_file('cat.jpg')")
    log.error("The demo could not do what was asked", exc_info=error)
    return plain("This did not work. What went wrong is in the demo's log.")


# What `preprocess` gives is Any below: the types of gradio's own are those of its own components' values.


class _WithoutStub(type(gr.Image)):
    """Gradio writes a .pyi file beside the source of a new component; a package does not change itself."""

    def __new__(mcs, name, bases, attributes):
        return ABCMeta.__new__(mcs, name, bases, attributes)


class _FromTheirMachine(Block):
    is_template = True  # drawn in the browser as its first base is

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Refuses web addresses, which the API would have the server fetch."""
        if str(url_or_file_path).startswith(("http:", "https:")):
            raise plain("Web addresses are not fetched. Send the picture itself.")
        return await super().async_move_resource_to_block_cache(url_or_file_path)


def _reference(file: FileData) -> ImageRef:
    """By reference, so that both models share what the tower made of it; named as on their machine."""
    if not Path(file.path).is_file():
        raise plain("The picture is no longer here: uploads are kept for an hour. Choose it again.")
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", Path(file.orig_name or "").name).lstrip(".")
    return ImageRef(path=Path(file.path), name=name or "the picture")


class SafeImage(gr.Image, _FromTheirMachine, metaclass=_WithoutStub):
    """An image input whose pictures go through our loader: a bad one gives a plain sentence."""

    def preprocess(self, payload: Any) -> Any:
        picture = payload and _reference(payload)
        if picture:
            load_image(picture)
        return picture


class SafeFiles(gr.File, _FromTheirMachine, metaclass=_WithoutStub):
    """Several pictures at once; whether each can be read is found out when it is its turn."""

    def preprocess(self, payload: Any) -> Any:
        files = list(payload or [])
        if len(files) > MOST_FILES:
            raise plain(f"{len(files):,} files are too many at once; choose {MOST_FILES:,} or fewer")
        return [_reference(file) for file in files]


def decoding(*sent: Any) -> dict[str, Any]:
    """What was sent, as numbers by name; the bounds are `Decoding`'s, but for those of the demo."""
    numbers: dict[str, Any] = dict(zip(("max_new_tokens", "temperature", "top_p", "seed"), sent, strict=True))
    numbers["seed"] = 0 if numbers["seed"] is None else numbers["seed"]  # an emptied field
    for name, number in numbers.items():
        flag, integer = "--" + name.replace("_", "-"), name in ("max_new_tokens", "seed")
        if type(number) not in (int, float) or (integer and number % 1 != 0):
            told = "empty" if number is None else reprlib.repr(number)
            raise plain(f"{flag} is {told}; expected a {'whole ' * integer}number")
        if integer:
            numbers[name] = int(number)
    if numbers["max_new_tokens"] > MAX_NEW_TOKENS:
        raise plain(f"--max-new-tokens is {sent[0]:.0f}; the demo gives {MAX_NEW_TOKENS} or fewer")
    return numbers


# -- folders and uploads ---------------------------------------------------------------------------------------


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
                if any(each.lower().endswith(PICTURES + TEXTS) for each in files):
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
        """The name of the new folder that uploads are put into, by `take_in`."""
        old = (folder for folder in self.uploads.glob("*") if folder.stat().st_mtime < time.time() - KEPT_SECONDS)
        for folder in old if self.passing else ():
            shutil.rmtree(folder, ignore_errors=True)
        name = f"{stem_of(files[0].name)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        take_in(files, self.uploads / name)
        return f"{UPLOADS}/{name}"


def take_in(files: Sequence[ImageRef], folder: Path) -> Path:
    """Put uploaded pictures, texts and what is in zips into a new ``folder``, where they stay.

    Raises:
        DataError: a name that leads elsewhere, a link, another kind of file, two of one name, or too much of all; the
            folder is then not there.
    """
    folder.mkdir(parents=True)
    room, count = MOST_BYTES, 0
    try:
        for file in files:
            for name, source in _sent(file):
                with source, _new(folder, name) as written:
                    piece, count = b" ", count + 1
                    while piece:
                        piece = source.read(1 << 20)  # what a zip says of its sizes is not believed
                        room -= len(piece)
                        if room < 0 or count > MOST_FILES:
                            raise DataError(
                                f"This is too much for one upload: {MOST_FILES:,} files and {MOST_BYTES >> 20:,} MB "
                                "unpacked are the most. Put larger data into a folder below --roots"
                            )
                        written.write(piece)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, zipfile.BadZipFile | zlib.error | RuntimeError | EOFError | OSError):
            what = f"cannot be unpacked ({type(error).__name__}); zip the folder again"
            raise DataError(f"{file.name}: {what}") from error
        raise
    return folder


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
    if Path(name).suffix.lower() not in PICTURES + TEXTS:
        raise DataError(f"{name!r} is neither a picture nor a text ({', '.join(PICTURES + TEXTS)}); leave it out")
    target = folder.joinpath(*parts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb")
    except FileExistsError:
        raise DataError(f"{name!r} is there twice; rename one of the two, or zip their folders") from None
    except OSError as error:
        raise DataError(f"{name!r}: cannot be put there ({error.strerror}); give it a shorter name") from error


def stem_of(name: str) -> str:
    """A plain name for a folder, from any."""
    return re.sub(r"[^\w-]+", "-", name.rpartition("/")[2].split(".")[0]).strip("-")[:60] or "pictures"


def short(text: str, *folders: Path) -> str:
    """Without the paths of this machine."""
    for path in (above for folder in folders for above in (folder, *folder.parents[:-1])):
        text = text.replace(f"{path}/", "").replace(str(path), path.name)
    return text
