"""`Example`: one image (or an ordered few) and all that is said about it. No pixels, no tokens."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

from vlm_lora.errors import DataError

MAX_FILE_BYTES = 1 << 30  # 50 megapixels of 16-bit RGBA are 400 MB; what is larger than 1 GiB is no picture


def read_regular_file(path: Path, name: str) -> bytes:
    """Bytes of a regular file. Raises DataError for anything else; never waits on a FIFO or a device."""
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would wait for ever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name!r} cannot be opened: {reason}; check that the file is there and readable") from error
    try:
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{name!r} is not a regular file; expected an image file")
            if status.st_size > MAX_FILE_BYTES:
                raise DataError(f"{name!r} has {status.st_size:,} bytes, the limit is {MAX_FILE_BYTES:,}; shrink it")
            return file.read(max(status.st_size, 65536) + 1)  # Python sets aside as much as it is asked for, at once
    except OSError as error:  # a directory, a bad disk
        raise DataError(f"{name!r} cannot be read: {error.strerror or error}; expected an image file") from error


class ByteSource(Protocol):
    """An image inside another file (a Parquet cell, a member of a tar). Hashable, picklable."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class FilePart:
    """An image as it lies in a larger file: a member of an uncompressed tar, one of many that were fetched."""

    path: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.path.name}: cannot be read: {error.strerror or error}") from error
        if len(data) < self.size:
            raise DataError(f"{self.path.name}: {self.name!r} is cut off; copy or download it again")
        return data


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the bytes of one image are. Nothing is read before `read_bytes`."""

    path: Path
    """Absolute and resolved; with `embedded`, the file that holds the image."""
    name: str
    """As written in the data, for messages."""
    size: int | None = None
    """Bytes, as found when the data was read; None where nobody looked."""
    sha256: str | None = None
    """Hash of the bytes (hex) where the reader had them in its hands anyway."""
    embedded: ByteSource | None = None
    """Set where the image is not a file of its own."""

    def read_bytes(self) -> bytes:
        """The encoded image. Raises DataError if it is gone, unreadable or not a regular file."""
        return self.embedded.read() if self.embedded else read_regular_file(self.path, self.name)


class Placed:
    """What has a place in the data: a file, and a line where the file has lines."""

    __slots__ = ()
    source: str
    line: int | None

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing asked and its answer."""

    user: str
    assistant: str
    images: tuple[int, ...] = ()
    """Where images stand in `user`: before its character of this number, an image each, in order. Where no turn of a
    dialogue says so, all images of its Example stand at its beginning."""
    weight: float = 1.0
    """What the loss of the answer is multiplied by; 0: it is read, and not learnt."""

    @property
    def pieces(self) -> list[str]:
        """`user` cut where its images stand: one more than there are images, perhaps empty."""
        ends = (0, *self.images, len(self.user))
        return [self.user[a:b] for a, b in pairwise(ends)]

    def asking(self, pieces: Sequence[str]) -> "Turn":
        """The turn with this text, an image between each piece and the next."""
        places = accumulate(len(piece) for piece in pieces[:-1])
        return replace(self, user="".join(pieces), images=tuple(places))


REF, BBOX = "<ref-object>", "<bbox>"
"""In the texts of a dialogue with boxes: where the next of its `refs` stands, and the next of its `boxes`."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box (x1, y1, x2, y2) or a point (x, y), in pixels of one of the Example's images as it is seen upright."""

    points: tuple[float, ...]
    image: int
    """Which of the images, from 0."""
    size: tuple[int, int]
    """Width and height of that image."""
    clipped: bool = field(default=False, compare=False)
    """Whether it reached out of the image, by a little, and was cut off there."""


@dataclass(frozen=True, slots=True)
class Dialogue(Placed):
    """A conversation about the images of its Example; a caption is a dialogue of one turn."""

    turns: tuple[Turn, ...]
    kind: str | None = None
    """Type of the question, where the data has one ("yes/no", "colour")."""
    accepted: tuple[str, ...] = ()
    """All human answers to the last turn where the data has several, else empty."""
    choices: tuple[str, ...] = ()
    """Of a multiple choice: the texts of its options, that of A first. The last turn's answer is a letter."""
    refs: tuple[str, ...] = ()
    """The names that stand in its turns at each `REF`, in order."""
    boxes: tuple[Box, ...] = ()
    """The boxes and points that stand in its turns at each `BBOX`, in order."""
    system: str = ""
    """What the system message says; without one the model's template has its own, or none."""
    caption: bool | None = field(default=None, compare=False)
    """Whether its row holds a caption: a text about the images, and not the answer to a question. None: the question
    tells."""
    split: str = ""
    """The part of the data that its row says it belongs to: train, val or test."""
    source: str = field(default="", compare=False)
    """The file of its row; and which row of it ("x.json:row 3") where the format has no lines."""
    line: int | None = field(default=None, compare=False)

    @property
    def has_marks(self) -> bool:
        """Whether `REF` and `BBOX` stand for something in its turns; else they are the letters they are."""
        return bool(self.refs or self.boxes)

    @property
    def answers_with_boxes(self) -> bool:
        """Whether its last answer says where something is, by boxes of its own or in Qwen's JSON."""
        last = self.turns[-1].assistant
        marked = last.count(BBOX) if self.boxes else 0
        return any(len(box.points) == 4 for box in self.boxes[len(self.boxes) - marked :]) or '"bbox_2d"' in last


@dataclass(frozen=True, slots=True)
class Example(Placed):
    """One image (or an ordered few) and its dialogues: five COCO captions are five of one turn."""

    id: str
    images: tuple[ImageRef, ...]
    dialogues: tuple[Dialogue, ...]
    source: str
    """With `line`, the first row that named these images."""
    weight: int = 1
    """How often an epoch learns from each of its dialogues."""
    line: int | None = None
