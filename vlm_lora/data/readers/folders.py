"""Folders of images, each with a caption file of its own (sidecar) or in the folder of its class; and what files a
folder holds at all."""

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.data.images import IMAGE_SUFFIXES
from vlm_lora.data.locate import Finder
from vlm_lora.data.origin import depend_on
from vlm_lora.data.readers.fields import SPLITS
from vlm_lora.data.readers.gather import BadRow, Entry
from vlm_lora.data.readers.prompts import filled, variables_of
from vlm_lora.data.readers.rows import text_of
from vlm_lora.data.readers.tables import MAX_TEXT_BYTES, decode_text
from vlm_lora.errors import DataError


class Twins(NamedTuple):
    """Two folders, one of images and one of their captions."""

    images: Path
    captions: Path


CAPTION_SUFFIXES = (".txt", ".caption")
JUNK = ("thumbs", "desktop")
"""Windows puts Thumbs.db and desktop.ini beside pictures."""
NOT_CAPTIONS = ("readme", "license", "licence", "notes", "classes", "requirements")


def visible_files(folder: Path, *, below: bool = True) -> list[Path]:
    """Files of the folder and (`below`), at any depth, below it, sorted; nothing hidden, no linked folder."""
    files = []
    depend_on(folder)
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
        depend_on(parent)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield from (p for name in sorted(files) if is_image_name(p := Path(parent, name)))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # .git, ._a.jpg and __MACOSX of a Mac's archives


def is_image_name(path: Path) -> bool:
    """Whether the name promises an image; what is inside, `load_image` finds out."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and not _is_hidden(path.name)


def has_sidecars(files: Sequence[Path], twins: Twins | None = None) -> bool:
    """Whether at least one image has a caption file of its own name."""
    captions = {_key(file, twins) for file in files if _is_caption_name(file)}
    return any(not captions.isdisjoint(_keys(file, twins)) for file in files if is_image_name(file))


def find_twins(folder: Path) -> Twins | None:
    """`images/` and `captions/`, where the folder has one of each."""
    beside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    images = [path for path in beside if path.name.lower() in ("images", "image", "imgs", "img", "pictures", "photos")]
    captions = [path for path in beside if path.name.lower() in ("captions", "caption", "texts", "text", "txt")]
    return Twins(images[0], captions[0]) if len(images) == len(captions) == 1 else None


def repeats_of(folder: Path, files: Sequence[Path]) -> tuple[dict[Path, int], str]:
    """How often kohya's trainers show the images of each folder, `10_birds`: where all images lie in such ones, side
    by side. Else what to say of those that are called so."""
    places = sorted({file.parent for file in files if is_image_name(file)})
    found = [(place, re.fullmatch(r"([1-9]\d{0,2})_.*\S.*", place.name)) for place in places if place != folder]
    repeats = {place: int(match[1]) for place, match in found if match}
    beside = {place.parent for place in places}
    if not repeats or (len(repeats) == len(places) and len(beside) == 1):
        return repeats, ""
    return {}, f"{next(iter(repeats)).name}/ counts once: not all images lie in folders of such names, side by side"


def read_sidecars(
    files: Sequence[Path], finder: Finder, prompt: str, folder: Path, twins: Twins | None = None
) -> Iterator[Entry | BadRow]:
    """A dialogue for each image with exactly one caption file: all of it, without the newlines at its end.

    `a.jpg` has `a.txt`, `a.caption` or `a.jpg.txt`, beside it or, of `twins`, in the folder of captions. What lies
    in `val/` or `test/` of `folder` belongs to that part of the data.

    BadRows: an image without one or with two (`a.txt`, `a.caption`), two images with the same one (`a.jpg`,
    `a.png`), a caption file without an image.
    """
    images: dict[str, list[Path]] = {}
    captions: dict[str, list[Path]] = {}
    for path in files:
        if is_image_name(path):
            images.setdefault(_keys(path, twins)[0], []).append(path)
        elif _is_caption_name(path):
            captions.setdefault(_key(path, twins), []).append(path)
    for of_stem in images.values():
        shared = captions.pop(_keys(of_stem[0], twins)[0], [])
        for path in of_stem:
            name = path.relative_to(finder.root).as_posix()
            texts = [*shared, *captions.pop(_keys(path, twins)[1], [])]
            try:
                if "tags" in variables_of(prompt) and {t.suffix.lower() for t in texts} == {".txt", ".caption"}:
                    texts = [text for text in texts if text.suffix.lower() == ".caption"]  # the other holds the tags
                if not texts:
                    where = f"in {twins.captions.name}/" if twins else "beside it"
                    raise DataError(f"has no caption; expected {path.stem + '.txt'!r} {where}")
                if len(texts) > 1:
                    raise DataError(f"has {len(texts)} captions: {_names(texts)}; keep one")
                if len(of_stem) > 1 and shared:
                    raise DataError(f"{texts[0].name!r} would be for {_names(of_stem)}; rename one")
                ref = finder.find(name)
                caption = _caption(texts[0], finder)
                asked = filled(prompt, ref, {}, caption_file=texts[0].suffix)
                part = _part(path, twins.images if twins and path.is_relative_to(twins.images) else folder)
                turns = (Turn(asked, caption),)
                yield (ref,), Dialogue(turns, caption=True, prompt=prompt, split=part, source=name, line=1)
            except DataError as error:
                yield BadRow(name, None, str(error))
    for path in (path for texts in captions.values() for path in texts):
        if path.stem.lower() not in NOT_CAPTIONS:
            yield BadRow(path.relative_to(finder.root).as_posix(), None, "is a caption without an image of its name")


def _is_caption_name(path: Path) -> bool:
    return os.path.splitext(path)[1].lower() in CAPTION_SUFFIXES


def _key(path: Path, twins: Twins | None) -> str:
    """The name without its ending, by which images and captions are matched; a Mac takes letters and accents apart."""
    stem = os.path.splitext(path)[0]
    if twins:
        folder = next((each for each in twins if path.is_relative_to(each)), None)
        stem = os.path.relpath(stem, folder) if folder else stem
    return unicodedata.normalize("NFC", stem)


def _keys(image: Path, twins: Twins | None) -> tuple[str, str]:
    """What the caption of an image may be matched by: `a` and `a.jpg`."""
    key = _key(image, twins)
    return key, key + image.suffix


def _part(path: Path, folder: Path) -> str:
    """The part of the data that the image belongs to, by the folder below `folder` that it lies in."""
    first, *below = path.relative_to(folder).parts
    return SPLITS.get(first.lower(), "") if below else ""


GENERAL = re.compile(
    r"images?|imgs?|pictures?|photos?|pics|data|raw|train(ing)?|val(id(ation)?)?|dev|test(ing)?|masks?|labels?|depth"
    r"|annotations?|captions?|texts?|thumb(nail)?s?|crops?|originals?|new folder.*|camera|screenshots?|downloads?"
    r"|\d{3}[a-z_]{5}|[\W\d_]*",
    re.IGNORECASE,
)
"""Names of folders that tell nothing of what is in the pictures: numbers, dates and cameras' (100CANON) too."""


def why_no_classes(folder: Path, files: Sequence[Path]) -> str:
    """Why the names of the folders that images lie in are not taken for what the images show; "" if they are."""
    images = [file.relative_to(folder).parts for file in files if is_image_name(file)]
    others = [file for file in files if not is_image_name(file) and file.stem.lower() not in (*NOT_CAPTIONS, *JUNK)]
    names = sorted({parts[0] for parts in images})
    if not images or any(len(parts) != 2 for parts in images) or len(names) < 2:
        return "not each image lies in one of several folders"
    if others:
        return f"there are other files too, as {others[0].relative_to(folder).as_posix()!r}"
    general = [name for name in names if GENERAL.fullmatch(name)]
    return f"a folder is called {general[0]!r}" if general else ""


def read_classes(
    files: Sequence[Path], finder: Finder, prompt: str, folder: Path, repeats: dict[Path, int]
) -> Iterator[Entry | BadRow]:
    """For each image the name of the folder that it lies in, as the answer to the prompt; of `10_birds`, "birds"."""
    for path in filter(is_image_name, files):
        name = path.relative_to(finder.root).as_posix()
        try:
            if path.parent == folder:
                raise DataError("lies in no folder of a class; move it into the one of what it shows")
            ref = finder.find(name)
            shown = path.parent.name
            if path.parent in repeats:
                shown = shown.partition("_")[2].strip()
            answer = text_of(unicodedata.normalize("NFC", shown), "name of a class")
            part = _part(path, folder) if path.parent.parent != folder else ""
            turns = (Turn(filled(prompt, ref, {}), answer),)
            yield (ref,), Dialogue(turns, caption=False, prompt=prompt, split=part, source=name)
        except DataError as error:
            yield BadRow(name, None, str(error))


def _names(paths: list[Path]) -> str:
    return ", ".join(repr(path.name) for path in paths)


def _caption(path: Path, finder: Finder) -> str:
    # Found as an image is: a caption file may be a link out of the folder or a pipe just as well
    ref = finder.find(path.relative_to(finder.root).as_posix())
    if (ref.size or 0) > MAX_TEXT_BYTES:
        raise DataError(f"{path.name!r} has {ref.size:,} bytes, the limit is {MAX_TEXT_BYTES:,}; shorten it")
    text = decode_text(ref.read_bytes(), path.name)
    return text_of(text.rstrip("\r\n"), f"caption file {path.name!r}")
