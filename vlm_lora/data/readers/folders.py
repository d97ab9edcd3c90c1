"""Folders of images, each with a caption file of its own (sidecar), and what files a folder holds at all."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.data.images import IMAGE_SUFFIXES
from vlm_lora.data.locate import Finder
from vlm_lora.data.readers.gather import BadRow, Entry
from vlm_lora.data.readers.prompts import filled, variables_of
from vlm_lora.data.readers.rows import text_of
from vlm_lora.data.readers.tables import MAX_TEXT_BYTES, decode_text
from vlm_lora.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")
NOT_CAPTIONS = ("readme", "license", "licence", "notes", "classes", "requirements")


def visible_files(folder: Path, *, below: bool = True) -> list[Path]:
    """Files of the folder and (`below`), at any depth, below it, sorted; nothing hidden, no linked folder."""
    files = []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if _is_hidden(entry.name):
            continue
        if not os.path.isdir(entry.path):  # unlike entry.is_dir() it does not raise for a loop of links
            files.append(Path(entry.path))
        elif below and not entry.is_symlink():
            files += visible_files(Path(entry.path))
    return files


def images_below(folder: Path) -> Iterator[Path]:
    """Files named like an image in the folder and, at any depth, below it; linked folders are not entered."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield from (p for name in sorted(files) if is_image_name(p := Path(parent, name)))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # .git, ._a.jpg and __MACOSX of a Mac's archives


def is_image_name(path: Path) -> bool:
    """Whether the name promises an image; what is inside, `load_image` finds out."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and not _is_hidden(path.name)


def has_sidecars(files: Sequence[Path]) -> bool:
    """Whether at least one image has a caption file of its own name."""
    parts = [os.path.splitext(f) for f in files]
    stems = {stem for stem, suffix in parts if suffix.lower() in CAPTION_SUFFIXES}
    return any(stem in stems and is_image_name(f) for f, (stem, _) in zip(files, parts, strict=True))


def read_sidecars(files: Sequence[Path], finder: Finder, prompt: str) -> Iterator[Entry | BadRow]:
    """A dialogue for each image with exactly one caption file: all of it, without the newlines at its end.

    BadRows: an image without one or with two (`a.txt`, `a.caption`), two images with the same one (`a.jpg`,
    `a.png`), a caption file without an image.
    """
    images: dict[str, list[Path]] = {}
    captions: dict[str, list[Path]] = {}
    for path in files:
        stem, suffix = os.path.splitext(path)
        if is_image_name(path):
            images.setdefault(stem, []).append(path)
        elif suffix.lower() in CAPTION_SUFFIXES:
            captions.setdefault(stem, []).append(path)
    for stem, of_stem in images.items():
        texts = captions.pop(stem, [])
        for path in of_stem:
            name = path.relative_to(finder.root).as_posix()
            try:
                if "tags" in variables_of(prompt) and {t.suffix.lower() for t in texts} == {".txt", ".caption"}:
                    texts = [text for text in texts if text.suffix.lower() == ".caption"]  # the other holds the tags
                if not texts:
                    raise DataError(f"has no caption; expected {Path(stem).name + '.txt'!r} beside it")
                if len(texts) > 1:
                    raise DataError(f"has {len(texts)} captions: {_names(texts)}; keep one")
                if len(of_stem) > 1:
                    raise DataError(f"{texts[0].name!r} would be for {_names(of_stem)}; rename one")
                ref = finder.find(name)
                caption = _caption(texts[0], finder)
                asked = filled(prompt, ref, {}, caption_file=texts[0].suffix)
                yield (ref,), Dialogue((Turn(asked, caption),), caption=True, source=name, line=1)
            except DataError as error:
                yield BadRow(name, None, str(error))
    for path in (path for texts in captions.values() for path in texts):
        if path.stem.lower() not in NOT_CAPTIONS:
            yield BadRow(path.relative_to(finder.root).as_posix(), None, "is a caption without an image of its name")


def _names(paths: list[Path]) -> str:
    return ", ".join(repr(path.name) for path in paths)


def _caption(path: Path, finder: Finder) -> str:
    # Found as an image is: a caption file may be a link out of the folder or a pipe just as well
    ref = finder.find(path.relative_to(finder.root).as_posix())
    if (ref.size or 0) > MAX_TEXT_BYTES:
        raise DataError(f"{path.name!r} has {ref.size:,} bytes, the limit is {MAX_TEXT_BYTES:,}; shorten it")
    text = decode_text(ref.read_bytes(), path.name)
    return text_of(text.rstrip("\r\n"), f"caption file {path.name!r}")
