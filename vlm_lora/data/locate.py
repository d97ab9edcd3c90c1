"""Where an image is that the data name: a regular file inside of the data's folder, or on the web where allowed.

None is decoded here.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import IMAGE_SUFFIXES
from vlm_lora.data.origin import depend_on
from vlm_lora.data.texts import windows_hint
from vlm_lora.errors import DataError

Find = Callable[[Any], ImageRef]
"""A name, or whatever else stands for an image in a row -> the image; raises DataError."""
_NO_UTF8 = re.compile("[\ud800-\udfff]")
IMAGE_FOLDERS = ("images", "Images", "image", "imgs", "img", "pictures", "photos", "train", "val")
IMAGE_FOLDERS += ("train2014", "val2014", "train2017", "val2017", "flickr30k_images", "Flicker8k_Dataset")


def folders_beside(file: Path, root: Path) -> tuple[Path, ...]:
    """Where the images of a file of rows may be: its folder, the root, and `images/` and the like below these."""
    names = [file.stem, *re.findall(r"(?:train|val|test)\d*", file.stem), *IMAGE_FOLDERS]
    places = [file.parent, root]
    for place in [place / name for place in places for name in names]:
        depend_on(place)
        places.append(place)
    return tuple(dict.fromkeys(place for place in places if place.is_dir()))


@dataclass
class Finder:
    """Finds the images of one source, and remembers them."""

    root: Path
    """The resolved folder that images may not leave."""
    folders: tuple[Path, ...] = ()
    """Where a relative name is looked for, the first that has it; the root where left out."""
    allow_outside: bool = False
    fetch: Callable[[str], ImageRef] | None = None
    """Gets an image from the web; without it URLs are refused."""
    elsewhere: "Finder | None" = None
    """Looks for the images that are not here."""
    refs: dict[str, ImageRef | None] = field(init=False, default_factory=dict)
    """All names that were asked for; None where there is no such image."""

    def __post_init__(self) -> None:
        self.folders = self.folders or (self.root,)
        # Only the folder of a regular file may be a link: one look-up for all the files in it
        self._real_folder = lru_cache(maxsize=64)(os.path.realpath)

    def find(self, value: Any) -> ImageRef:
        """The image that `value` means: its name in the data, `{"path": name}`, or the image itself.

        Raises DataError if it is missing, a URL, outside of the root (also by a symlink), or no regular file.
        """
        if isinstance(value, ImageRef):  # embedded: the container's reader made it
            return value
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"expected the file name of an image, found {value!r}")
        if ref := self.refs.get(value):
            return ref
        self.refs[value] = None
        try:
            ref = self.refs[value] = self._find(value)
        except DataError as error:
            if self.elsewhere is None or is_web_address(value):
                raise
            try:
                ref = self.refs[value] = self.elsewhere.find(value)
            except DataError:
                raise DataError(f"{error}; it is not in the folder of --images either") from None
        return ref

    def _find(self, name: str) -> ImageRef:
        plain = unquote(name[7:]) if name.startswith("file:///") else name
        if _NO_UTF8.search(plain):  # such a file may exist, but could be neither printed nor written to a report
            how = "save the file of rows as UTF-8, or rename the image"
            raise DataError(f"{name[:200]!r} has a name that is not UTF-8{windows_hint(plain)}; {how}")
        if is_web_address(plain):
            if self.fetch:
                return self.fetch(plain)
            how = "download it and write its file name here, or pass --allow-urls"
            raise DataError(f"{name[:200]!r} is a URL, which is not fetched; {how}")
        try:
            path = self._place(plain)
            if path is None and (path := self._with_ending(plain)):
                name += os.path.splitext(path)[1]
            if path is None:
                raise DataError(self._missing(name, plain))
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                above, own = os.path.split(path)
                real = os.path.join(self._real_folder(above, strict=True), own)
            else:
                real = os.path.realpath(path, strict=True)
                status = os.stat(real)
        # A NUL byte in the name, too long a name, a loop of symlinks, one that leads nowhere
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{name[:200]!r} cannot be opened: {reason}; check the name and what it points to"
            ) from None
        if not self.allow_outside and not real.startswith(os.path.join(self.root, "")) and real != str(self.root):
            how = "move it there, or pass --allow-outside to trust it"
            raise DataError(f"{name!r} lies outside of the data folder; {how}")
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
            raise DataError(f"{name!r} is {what}; expected an image file")
        return ImageRef(path=Path(real), name=name, size=status.st_size)

    def _place(self, name: str) -> str | None:
        """Where a file of this name is, or of another spelling of it; None where there is none."""
        for path in (os.path.join(folder, spelling) for spelling in _spellings(name) for folder in self.folders):
            depend_on(path)
            if os.path.lexists(path):
                return path
        return None

    def _with_ending(self, name: str) -> str | None:
        """Where the image is that a name without an ending means (kohya's metadata). Raises DataError for several."""
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES or not os.path.basename(name).strip("."):
            return None
        found = {}
        for ending in sorted(IMAGE_SUFFIXES):
            for path in filter(None, (self._place(name + ending), self._place(name + ending.upper()))):
                found.setdefault(os.path.normcase(os.path.realpath(path)), path)
        if len(found) > 1:
            names = " or ".join(map(repr, map(os.path.basename, found.values())))
            raise DataError(f"{name!r} may be {names}; write the one that is meant")
        return next(iter(found.values()), None)

    def _missing(self, name: str, plain: str) -> str:
        if re.match(r"[A-Za-z]:[\\/]|\\\\", plain):
            return (
                f"{name[:200]!r} is a place on a Windows computer; write the name below the data's folder, as "
                f"{'/'.join(PureWindowsPath(plain).parts[-2:])!r}"
            )
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", plain):  # two letters or more: C:\ is a drive
            return f"{name[:200]!r} is a URL, which is not fetched; download it and write its file name here"
        looked = ", ".join(dict.fromkeys(f"{folder.relative_to(self.root).as_posix()}/" for folder in self.folders))
        return f"there is no file {name!r} (looked in {looked} of the data folder)"


def _spellings(name: str) -> Iterator[str]:
    """The name as it is written, and as the file may be called: of Windows, of a Mac, of Label Studio."""
    names = [name]
    if match := re.fullmatch(r"/data/(?:upload/\d+/|local-files/\?d=)(.+)", name):  # Label Studio's own server
        served = unquote(match[1])
        names += [served, re.sub(r"^[0-9a-f]{8}-", "", served), os.path.basename(served)]
    if "\\" in name and not PureWindowsPath(name).drive:
        names.append(name.replace("\\", "/"))
    for each in dict.fromkeys(names):
        yield each
        if not each.isascii():  # a Mac takes the accents of a name's letters apart, other systems do not
            yield unicodedata.normalize("NFC", each)
            yield unicodedata.normalize("NFD", each)


def is_web_address(name: object) -> bool:
    """Whether this is a name of something on the web."""
    return isinstance(name, str) and re.match(r"https?://", name, re.IGNORECASE) is not None
